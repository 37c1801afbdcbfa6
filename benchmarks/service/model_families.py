"""Which families of models give the same numbers here as in plain transformers.

    python -m benchmarks.service.model_families judges [FAMILY ...]

`judges`: a tiny random classifier of each family in the service's own scorer, in fp32, beside plain transformers
(`model(**tokenizer(text))`, one text at a time). Each number is the largest difference of any logit, as a share of the
text's largest logit where that is more than 1. "Short" texts have up to 20 words; texts of full length fill the model's
positions. Prints a Markdown table, with the way of batching that the service chose at its start.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.tiny_judges import FAMILIES, tiny_judge
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
HEADER = "| family | batches | short, alone | short, in a batch | full length, alone | full length, in a batch |"


def judge_row(family: str, folder: Path) -> str:
    """One family's row of the table, or what the service says when it refuses the model."""
    directory = tiny_judge(folder / family, family)
    try:
        scorer = load_scorer(Settings(model=str(directory), threads=1))
    except ModelError as error:
        return f"| {family} | refused | {str(error).replace(str(folder) + os.sep, '')} | | | |"
    full = ["word " * 400, "bad " * 400]
    short_alone, short_together = differences(scorer, directory, SHORT, [*SHORT, full[0]])
    full_alone, full_together = differences(scorer, directory, full, [full[0], *SHORT, full[1]])
    numbers = (short_alone, short_together, full_alone, full_together)
    return f"| {family} | {scorer.batching} | " + " | ".join(f"{number:.0e}" for number in numbers) + " |"


def differences(
    scorer: TransformersScorer, directory: Path, texts: Sequence[str], company: Sequence[str]
) -> tuple[float, float]:
    """The largest difference from plain transformers of `texts` alone, and within `company`."""
    encodings = dict(zip(company, scorer.encode([(text, None) for text in company]), strict=True))
    together = dict(zip(company, scorer.score(list(encodings.values()), 0), strict=True))
    alone = {text: scorer.score([encodings[text]], 0)[0] for text in texts}
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    takes = ("input_ids",) if model.config.model_type == "fnet" else ("input_ids", "attention_mask")
    worst = [0.0, 0.0]
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=scorer.max_tokens, return_tensors="pt")
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
    judges.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(HEADER)
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families or FAMILIES:
            with contextlib.redirect_stdout(None):
                row = judge_row(family, Path(folder))
            print(row, flush=True)


if __name__ == "__main__":
    main()
