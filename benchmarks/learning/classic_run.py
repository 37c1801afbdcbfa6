"""One PPO run of trl 0.11.4: the other side of `benchmarks.learning.against_trl`, which writes the plan and starts it.

Runs in an environment of its own, the one that `benchmarks.ppo.classic_recipe` describes, and imports nothing of
Plaudit. The plan is a JSON file: models, settings, and each step's prompts and response lengths. Everything that
learns is the library's own: model with value head, `PPOTrainer.generate` on lists of queries, `PPOTrainer.step`. The
judge runs in the same process and reads the same text as Plaudit's service. Writes the adapters after some of the
steps, and after the last step `steps.json` with reward and KL of each.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--output-dir", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    plan = json.loads(arguments.plan.read_text())

    torch.manual_seed(plan["seed"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(plan["policy"]) / "tokenizer.json"), eos_token=END, pad_token=END
    )
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **plan["lora"])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plan["policy"], peft_config=lora)
    trainer = PPOTrainer(PPOConfig(seed=plan["seed"], **plan["ppo"]), model, None, tokenizer)
    judge = Judge(plan["judge"])
    records = []
    for step, (prompts, lengths) in enumerate(zip(plan["prompts"], plan["lengths"])):  # noqa: B905
        queries = [torch.tensor(prompt) for prompt in prompts]
        responses = generate(trainer, queries, lengths, plan["generate_batch_size"])
        texts = [
            tokenizer.decode(torch.cat(pair), skip_special_tokens=True)
            for pair in zip(queries, responses)  # noqa: B905
        ]
        scores = judge(texts)
        statistics = trainer.step(queries, responses, list(scores))
        records.append({"reward": scores.mean().item(), "kl": float(statistics["objective/kl"])})
        if step + 1 in plan["checkpoints"]:
            directory = arguments.output_dir / f"step-{step + 1:06d}"
            model.pretrained_model.save_pretrained(str(directory), save_embedding_layers=False)
    (arguments.output_dir / "steps.json").write_text(json.dumps(records))


def generate(trainer: Any, queries: list[torch.Tensor], lengths: list[int], batch_size: int) -> list[torch.Tensor]:
    """A response to each query, of at most its drawn length. A batch has one length limit: longer ones are cut, which
    leaves the same distribution as a limit for each."""
    responses = trainer.generate(
        queries,
        batch_size=batch_size,
        return_prompt=False,
        max_new_tokens=max(lengths),
        min_length=-1,
        top_k=0,
        top_p=1.0,
        do_sample=True,
        pad_token_id=trainer.tokenizer.eos_token_id,
    )
    return [response[:length] for response, length in zip(responses, lengths)]  # noqa: B905


class Judge:
    """The POSITIVE logit of texts."""

    def __init__(self, directory: str) -> None:
        self._model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(Path(directory) / "tokenizer.json"),
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            unk_token="[UNK]",
        )
        self._label = self._model.config.label2id["POSITIVE"]

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, self._label]


if __name__ == "__main__":
    main()
