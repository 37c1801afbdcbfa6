"""Which families of models give the same numbers here as in plain transformers.

    python -m benchmarks.service.model_families judges [--table docs/evidence/models.md] [FAMILY ...]

`judges`: a tiny random classifier of each family in the service's own scorer, in fp32, beside plain transformers
(`model(**tokenizer(text))`, one text at a time). Each number is the largest difference of any logit, as a share of the
text's largest logit where that is more than 1. "Short" texts have up to 20 words; "full" ones fill the model's
positions. In the further columns a number is the largest over short and full texts, alone and in a batch: for a judge
of one logit; for one whose files are in bf16; and for LoRA adapters with a trained head, in a directory of their own,
beside peft with their base. "Chat" has conversations (`--join chat`) beside `apply_chat_template` of the same
tokenizer, token for token. "Batches" is the way of batching that the service chose at its start.

`--table` writes the table into a document in place of the one there, and prints it too.
"""

import argparse
import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from benchmarks.tables import measured_on, put
from harness.tiny_judges import FAMILIES, tiny_judge
from harness.tiny_policies import tiny_policy
from plaudit.policy.lora_targets import default_targets
from plaudit.reward_service.engine.batching import Chat
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings

SHORT = [
    "good",
    "a somewhat longer text about a film that is good , and not bad",
    "the worst plot",
    "it was the best story of love and hate !",
    "x",
]
FULL = ["word " * 400, "bad " * 400]


FURTHER = (
    "one logit",
    "bf16 files",
    "LoRA directory",
    "chat",
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}{{ eos_token }}"
)
"""Writes the special tokens itself, as chat templates do."""
CONVERSATIONS = [
    (("user", "good film ?"), ("assistant", "a bad one !")),
    (("system", "be kind"), ("user", "why is it the worst plot ?"), ("assistant", "it is not")),
]
NO_JUDGES = ("mamba", "mamba2", "lfm2", "recurrent_gemma", "rwkv", "bamba")
"""Families of language models of which transformers has no classifier."""
TABLE = "judges"
HEADER = (
    f"| family | batches | short, alone | in a batch | full, alone | in a batch | {' | '.join(FURTHER)} |",
    "| --- | --- | --- | --- | --- | --- |" + " --- |" * len(FURTHER),
)


def judge_row(family: str, folder: Path) -> str:
    """One family's row of the table, or what the service says when it refuses the model."""
    directory = (tiny_policy if family in NO_JUDGES else tiny_judge)(folder / family, family)
    try:
        scorer = load_scorer(Settings(model=str(directory), threads=1))
    except ModelError as error:
        return f"| {family} | refused | {said(error, folder)} |{' |' * (3 + len(FURTHER))}"
    short_alone, short_together = differences(scorer, plain(directory), SHORT, [*SHORT, FULL[0]])
    full_alone, full_together = differences(scorer, plain(directory), FULL, [FULL[0], *SHORT, FULL[1]])
    numbers = [f"{number:.0e}" for number in (short_alone, short_together, full_alone, full_together)]
    further = [cell(family, folder, make) for make in (one_logit, half_precision, adapters)]
    further.append(conversations(family, folder / "chat"))
    return f"| {family} | {scorer.batching} | {' | '.join([*numbers, *further])} |"


def said(error: Exception, folder: Path) -> str:
    """A refusal, without where the model is."""
    return str(error).replace(str(folder) + os.sep, "").replace("|", "/")


def cell(family: str, folder: Path, make: Callable[[str, Path], tuple[Path, Any]]) -> str:
    """The largest difference between the service and plain transformers for another kind of judge."""
    try:
        directory, model = make(family, folder / make.__name__)
        scorer = load_scorer(Settings(model=str(directory), threads=1))
    except ModelError as error:
        return f"refused: {said(error, folder)}"
    except (ValueError, TypeError) as error:  # peft or transformers can't make such a judge
        return f"none: {type(error).__name__}: {' '.join(str(error).split()):.80}"
    return f"{max(differences(scorer, model, [*SHORT, *FULL], [FULL[0], *SHORT, FULL[1]])):.0e}"


def plain(directory: Path) -> Any:
    """The judge in plain transformers, in fp32."""
    return AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()


def one_logit(family: str, path: Path) -> tuple[Path, Any]:
    """A judge that gives a score and no classes."""
    directory = tiny_judge(path, family, id2label={0: "REWARD"}, label2id={"REWARD": 0})
    return directory, plain(directory)


def half_precision(family: str, path: Path) -> tuple[Path, Any]:
    """A judge whose files are in bf16, as many are published."""
    directory = tiny_judge(path, family)
    AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    return directory, plain(directory)


def adapters(family: str, path: Path) -> tuple[Path, Any]:
    """LoRA adapters and a trained head, which name the base that they were trained on."""
    base = tiny_judge(path / "base", family)
    model = plain(base)
    heads = [
        name for name, child in model.named_children() if name != model.base_model_prefix and list(child.parameters())
    ]
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            target_modules=default_targets(model),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            exclude_modules=heads,
            modules_to_save=heads,
            task_type="SEQ_CLS",
        ),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(path / "adapters")
    return path / "adapters", adapted.eval()


def conversations(family: str, path: Path) -> str:
    """The largest difference for conversations (`--join chat`), whose tokens are those of `apply_chat_template`."""
    directory = tiny_judge(path, family)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    try:
        scorer = load_scorer(Settings(model=str(directory), threads=1, join="chat"))
    except ModelError as error:
        return f"refused: {said(error, path.parent)}"
    model, worst = plain(directory), 0.0
    encodings = scorer.encode([Chat(turns) for turns in CONVERSATIONS])
    for turns, encoded, got in zip(CONVERSATIONS, encodings, scorer.score(encodings, 0), strict=True):
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        if list(encoded.ids) != ids:
            return "OTHER TOKENS"
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0]
        worst = max(worst, ((torch.tensor(got) - wanted).abs().max() / max(1.0, wanted.abs().max().item())).item())
    return f"{worst:.0e}"


def differences(
    scorer: TransformersScorer, model: Any, texts: Sequence[str], company: Sequence[str]
) -> tuple[float, float]:
    """The largest difference from the plain `model` of `texts` alone, and within `company`."""
    encodings = dict(zip(company, scorer.encode([(text, None) for text in company]), strict=True))
    together = dict(zip(company, scorer.score(list(encodings.values()), 0), strict=True))
    alone = {text: scorer.score([encodings[text]], 0)[0] for text in texts}
    takes = ("input_ids",) if model.config.model_type == "fnet" else ("input_ids", "attention_mask")
    worst = [0.0, 0.0]
    for text in texts:
        inputs = scorer.tokenizer(text, truncation=True, max_length=scorer.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            wanted = model(**{name: inputs[name] for name in takes}).logits[0]
        for place, got in enumerate((alone[text], together[text])):
            apart = (torch.tensor(got) - wanted).abs().max() / max(1.0, wanted.abs().max().item())
            worst[place] = max(worst[place], apart.item())
    return worst[0], worst[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    judges = commands.add_parser("judges", help="sequence classifiers in the reward service")
    every = [*FAMILIES, *NO_JUDGES]
    judges.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(every)}; all unless given")
    judges.add_argument("--table", type=Path, metavar="DOCUMENT", help="write the table into this document")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines = [f"Measured {measured_on('torch', 'transformers', 'peft')}.", "", *HEADER]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families or every:
            with contextlib.redirect_stdout(None), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lines.append(judge_row(family, Path(folder)))
            print(lines[-1], flush=True)
    if arguments.table:
        put(arguments.table, TABLE, lines)


if __name__ == "__main__":
    main()
