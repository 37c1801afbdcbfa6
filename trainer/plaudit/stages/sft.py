"""Stage 1: supervised fine-tuning. A base model (or sizes) and texts in, a Hugging Face model directory out."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, set_seed

from plaudit.data.sources import fingerprint, load_texts
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.policy.checks import check_tokenizer_fits, max_positions
from plaudit.policy.from_scratch import new_causal_lm, train_tokenizer
from plaudit.policy.model import load_causal_lm, load_tokenizer, load_whole_causal_lm
from plaudit.policy.reading import reading
from plaudit.policy.texts import tokens_in_front
from plaudit.policy.tokenizer import Tokenizer
from plaudit.run.storage import write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.sft import SFTConfig
from plaudit.stages.optimizers import build_optimizer
from plaudit.stages.supervised import (
    Run,
    begun,
    forget_checkpoints,
    require_same_figures,
    resumable,
    saved_model,
    train,
    training_arguments,
)


@dataclass(frozen=True)
class SFTResult:
    """What stage 1 measured on held-out texts."""

    held_out_loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    samples: list[str]


def run(config: SFTConfig) -> SFTResult:
    """Train, measure on held-out texts, save to `config.output_dir`."""
    with begun(config) as run:
        return _run(config, run)


def _run(config: SFTConfig, run: Run) -> SFTResult:
    set_seed(config.seed)
    texts = load_texts(config.dataset, "train")
    held_out = load_texts(config.dataset, "held_out")[: config.eval_texts]
    if config.from_scratch:
        tokenizer = train_tokenizer(texts, vocab_size=config.sizes.vocab_size, max_length=config.sizes.max_positions)
        model = new_causal_lm(config.sizes, tokenizer)
    else:
        with reading(config.model):
            model = load_whole_causal_lm(config.model, setting="model")
            tokenizer = load_tokenizer(config.model, setting="model")
        _check_start(config, model, tokenizer, texts)

    # Only now: these take seconds to import, and wrong data should be told before.
    from datasets import Dataset
    from trl import SFTConfig as TrlSFTConfig
    from trl import SFTTrainer

    ids = token_rows(tokenizer, texts, config.max_length)
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = resumable(SFTTrainer)(
        model=model,
        args=TrlSFTConfig(
            max_length=config.max_length,
            train_sampling_strategy="group_by_length",
            dataset_kwargs={"skip_prepare_dataset": True},
            **training_arguments(config),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, config.optimizer), None),
    )
    model = train(trainer, run, {"training texts": fingerprint(ids)})
    result = save(config, model, tokenizer, held_out, train_rows=len(rows))
    forget_checkpoints(run)
    figures = f"perplexity {result.perplexity:.1f} (loss {result.held_out_loss:.3f} nats a token)"
    print(f"held-out {figures}, saved in {config.output_dir}")
    for text in result.samples:
        print(f"  {text}")
    return result


def save(
    config: SFTConfig, model: PreTrainedModel, tokenizer: Tokenizer, held_out: list[str], *, train_rows: int
) -> SFTResult:
    """Saves the model with sft.json, what is measured on `held_out`, once it is proven on some of these texts.

    It is measured in fp32 with the numbers as they were saved. Raises as `saved_model` does.
    """

    def reproduces(directory: Path) -> None:
        again, few = load_causal_lm(directory, device=model.device), held_out[:8]
        own, others = (
            token_rows(tokenizer, few, config.max_length),
            token_rows(load_tokenizer(directory), few, config.max_length),
        )
        if own != others:
            raise NotAsSaved("the model is not saved: its tokenizer, loaded again, reads texts as other tokens")
        require_same_figures(
            "the loss on held-out texts",
            torch.tensor([held_out_loss(model, own)]),
            torch.tensor([held_out_loss(again.eval(), own)]),
        )

    with saved_model(
        model, tokenizer, config.output_dir, half_precision=config.half_precision, reproduces=reproduces
    ) as (model, beside):
        loss = held_out_loss(model, token_rows(tokenizer, held_out, config.max_length))
        samples = sample(model, tokenizer, held_out, seed=config.seed, length=min(36, config.max_length))
        result = SFTResult(loss, math.exp(loss), samples)
        measured = {"held_out_loss": loss, "perplexity": result.perplexity, "samples": result.samples}
        report = {"stage": "sft", "config": to_dict(config), "train_rows": train_rows, **measured}
        write_text(beside / "sft.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def _check_start(config: SFTConfig, model: PreTrainedModel, tokenizer: Tokenizer, texts: list[str]) -> None:
    check_tokenizer_fits(tokenizer, model, config.model, texts, setting="model")
    positions = max_positions(model)
    if positions is not None and config.max_length > positions:
        raise ConfigError(
            f"max_length={config.max_length}: model={config.model!r} has {positions} positions; give --max-length less"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model={config.model!r}: its tokenizer has no end-of-text token, and every text is closed by one: name "
            'one as "eos_token" in its tokenizer_config.json'
        )


def token_rows(tokenizer: Tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """Each text, closed by the end-of-text token, cut into rows of at most `max_length`, the first from its start.

    A text begins with what the tokenizer puts in front of it. Rows never join two texts, so the model sees openings as
    openings.
    """
    rows: list[list[int]] = []
    in_front = tokens_in_front(tokenizer)
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids = [*in_front, *ids, tokenizer.eos_token_id]
        rows.extend(ids[start : start + max_length] for start in range(0, len(ids), max_length))
    return [row for row in rows if len(row) > 1]


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: list[list[int]], batch_size: int = 32) -> float:
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
    if not math.isfinite(total):
        raise NotFinite(f"the loss on held-out texts is {total / count}: the model is not saved")
    return total / count


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: Tokenizer, texts: list[str], *, seed: int, length: int, count: int = 8
) -> list[str]:
    """What the model makes of the first four tokens of held-out texts, up to `length` tokens in all."""
    torch.manual_seed(seed)
    in_front = tokens_in_front(tokenizer)
    openings = tokenizer(texts[:count], add_special_tokens=False, verbose=False)["input_ids"]
    prompts = [[*in_front, *ids[:4]] for ids in openings]
    settings = {"do_sample": True, "max_length": length, "pad_token_id": tokenizer.pad_token_id}
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    drawn = [model.generate(row, attention_mask=torch.ones_like(row), **settings)[0] for row in rows]
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in drawn]
