"""Stage 1: supervised fine-tuning. A base model (or sizes) and texts in, a Hugging Face model directory out."""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import set_seed

from plaudit.data.sources import load_texts
from plaudit.policy.from_scratch import new_causal_lm, train_tokenizer
from plaudit.policy.model import load_causal_lm, load_tokenizer
from plaudit.settings.plain import to_dict
from plaudit.settings.sft import SFTConfig
from plaudit.stages.optimizers import build_optimizer
from plaudit.stages.supervised import save_model_directory, training_arguments


@dataclass(frozen=True)
class SFTResult:
    """What stage 1 measured on held-out texts."""

    held_out_loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    samples: list[str]


def run(config: SFTConfig) -> SFTResult:
    """Train, measure on held-out texts, save to `config.output_dir`."""
    set_seed(config.seed)
    texts = load_texts(config.dataset, "train")
    held_out = load_texts(config.dataset, "held_out")[: config.eval_texts]
    if config.from_scratch:
        tokenizer = train_tokenizer(texts, vocab_size=config.sizes.vocab_size, max_length=config.sizes.max_positions)
        model = new_causal_lm(config.sizes, tokenizer)
    else:
        model, tokenizer = load_causal_lm(config.model), load_tokenizer(config.model)

    # Only now: these take seconds to import, and wrong data should be told before.
    from datasets import Dataset
    from trl import SFTConfig as TrlSFTConfig
    from trl import SFTTrainer

    ids = token_rows(tokenizer, texts, config.max_length)
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = SFTTrainer(
        model=model,
        args=TrlSFTConfig(
            max_length=config.max_length,
            train_sampling_strategy="group_by_length",
            dataset_kwargs={"skip_prepare_dataset": True},
            **training_arguments(config.output_dir, config.optimizer, config.seed),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, config.optimizer), None),
    )
    trainer.train()

    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    loss = held_out_loss(model, token_rows(tokenizer, held_out, config.max_length))
    samples = sample(model, tokenizer, held_out, seed=config.seed, length=min(36, config.max_length))
    result = SFTResult(loss, math.exp(loss), samples)
    save_model_directory(model, tokenizer, config.output_dir, half_precision=config.half_precision)
    measured = {"held_out_loss": loss, "perplexity": result.perplexity, "samples": result.samples}
    report = {"stage": "sft", "config": to_dict(config), "train_rows": len(rows), **measured}
    (config.output_dir / "sft.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"held-out perplexity {result.perplexity:.1f} (loss {loss:.3f} nats a token), saved in {config.output_dir}")
    for text in result.samples:
        print(f"  {text}")
    return result


def token_rows(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Each text, closed by the end-of-text token, cut into rows of at most `max_length`, the first from its start.

    Rows never join two texts, so the model sees openings as openings.
    """
    rows: list[list[int]] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        rows.extend(ids[start : start + max_length] for start in range(0, len(ids), max_length))
    return [row for row in rows if len(row) > 1]


@torch.no_grad()
def held_out_loss(model: Any, rows: list[list[int]], batch_size: int = 32) -> float:
    """Mean negative log-likelihood (nats) of the tokens of `rows` after each row's first."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids = torch.full((len(batch), len(batch[-1])), 0, device=model.device)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
        logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


@torch.no_grad()
def sample(model: Any, tokenizer: Any, texts: list[str], *, seed: int, length: int, count: int = 8) -> list[str]:
    """What the model makes of the first four tokens of held-out texts, up to `length` tokens in all."""
    torch.manual_seed(seed)
    prompts = [ids[:4] for ids in tokenizer(texts[:count], add_special_tokens=False, verbose=False)["input_ids"]]
    settings = {"do_sample": True, "max_length": length, "pad_token_id": tokenizer.pad_token_id}
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    drawn = [model.generate(row, attention_mask=torch.ones_like(row), **settings)[0] for row in rows]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
