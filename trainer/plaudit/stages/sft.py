"""Stage 1: supervised fine-tuning of a model on texts or conversations; the result is a model directory."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import set_seed

from plaudit.data.chat_templates import use_chat_template
from plaudit.data.examples import IGNORED, Example, Rows, load_examples, rows_of
from plaudit.data.sources import fingerprint
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.parallel.devices import device_named
from plaudit.policy.adapters import (
    add_lora,
    base_of,
    is_adapters,
    load_adapters,
    on_full_precision,
    with_adapters,
)
from plaudit.policy.checks import check_tokenizer_fits, max_positions
from plaudit.policy.from_scratch import new_causal_lm, train_tokenizer
from plaudit.policy.pretrained import load_causal_lm, load_tokenizer, load_whole_causal_lm
from plaudit.policy.reading import reading
from plaudit.policy.texts import end_tokens, named_tokens, tokens_in_front
from plaudit.report.cards import stage_card
from plaudit.run.hub import push_results, require_pushable
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
    settled,
    train,
    training_arguments,
)

NEW_TOKENS = 36
"""Maximum length of a sample."""


@dataclass(frozen=True)
class SFTResult:
    """Held-out metrics of stage 1."""

    held_out_loss: float
    """Mean negative log-likelihood per token, in nats."""
    perplexity: float
    samples: list[str]


def run(config: SFTConfig) -> SFTResult:
    """Train, evaluate on held-out texts, save to `config.output_dir`."""
    require_pushable(config.push_to_hub)
    with begun(config) as run:
        result = _run(config, run)
    push_results(config.output_dir, config.push_to_hub, private=config.hub_private)
    return result


def _run(config: SFTConfig, run: Run) -> SFTResult:
    set_seed(config.seed)
    examples, line = load_examples(config, "train")
    print(line, flush=True)
    held_out = load_examples(config, "held_out")[0][: config.eval_texts]
    model, tokenizer = _start(config, examples)

    # Imported late: they take seconds, and data errors should come first.
    from datasets import Dataset
    from trl import SFTConfig as TrlSFTConfig
    from trl import SFTTrainer

    taken = _rows(config, tokenizer, examples, held_out)
    _end_turns(model, tokenizer, taken)
    _tell_example(tokenizer, taken)
    rows = Dataset.from_dict({"input_ids": taken.ids, "labels": taken.labels})
    run = settled(run, "sft", model, len(rows))
    config = replace(config, optimizer=run.config.optimizer)
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
    same = taken.labels == taken.ids
    model = train(
        trainer, run, {"training texts": fingerprint(taken.ids if same else zip(taken.ids, taken.labels, strict=True))}
    )
    if config.quantization is not None:
        model = on_full_precision(model, load_causal_lm(_base(config), device=model.device, setting="model"))
    if config.lora.enabled and config.merge:
        model = model.merge_and_unload().requires_grad_(True)
    result = save(config, model, tokenizer, held_out, train_rows=len(rows))
    forget_checkpoints(run)
    figures = f"perplexity {result.perplexity:.1f} (loss {result.held_out_loss:.3f} nats a token)"
    print(f"held-out {figures}, saved in {config.output_dir}")
    for text in result.samples:
        print(f"  {text}")
    return result


def _tell_example(tokenizer: Any, rows: Rows) -> None:
    """The first row of which a part is not learnt, token by token, and the part that is."""
    for ids, labels in zip(rows.ids, rows.labels, strict=True):
        if IGNORED in labels:
            learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
            print(f"an example, {len(ids)} tokens: {named_tokens(tokenizer, ids)}")
            print(f"  learnt of it: {named_tokens(tokenizer, learnt)}", flush=True)
            return


def save(config: SFTConfig, model: Any, tokenizer: Any, held_out: Sequence[Example], *, train_rows: int) -> SFTResult:
    """Save the model or its adapters, and sft.json with metrics on `held_out`, after checking that they load correctly.

    The metrics are computed in fp32 with the saved weights. Raises like `saved_model`.
    """
    few = held_out[:8]

    def reproduces(directory: Path) -> None:
        if config.saves_adapters:
            whole = load_causal_lm(_base(config), device=model.device)
            again: Any = load_adapters(whole, directory)
        else:
            again = load_causal_lm(directory, device=model.device)
        own, others = (rows_of(reader, few, config.max_length) for reader in (tokenizer, load_tokenizer(directory)))
        if own != others:
            raise NotAsSaved("the model is not saved: its tokenizer, loaded again, reads texts as other tokens")
        if own.ids:
            require_same_figures(
                "the loss on held-out texts",
                torch.tensor([held_out_loss(model, own.ids, own.labels)]),
                torch.tensor([held_out_loss(again.eval(), own.ids, own.labels)]),
            )

    with saved_model(
        model, tokenizer, config.output_dir, half_precision=config.half_precision, reproduces=reproduces
    ) as (model, beside):
        measured_on = rows_of(tokenizer, held_out, config.max_length)
        loss = held_out_loss(model, measured_on.ids, measured_on.labels)
        samples = sample(model, tokenizer, held_out, seed=config.seed, max_length=config.max_length)
        result = SFTResult(loss, math.exp(loss), samples)
        measured = {"held_out_loss": loss, "perplexity": result.perplexity, "samples": result.samples}
        report = {"stage": "sft", "config": to_dict(config), "train_rows": train_rows, **measured}
        write_text(beside / "README.md", _card(config, result, train_rows))
        write_text(beside / "sft.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def _card(config: SFTConfig, result: SFTResult, train_rows: int) -> str:
    """The model card."""
    name = "a new model" if config.from_scratch else config.model
    return stage_card(
        config,
        f"{name}, fine-tuned on {config.dataset.data}",
        f"""Supervised fine-tuning on {train_rows} rows. Perplexity on held-out texts {result.perplexity:.1f} (loss
{result.held_out_loss:.3f} nats a token).""",
        base=None if config.from_scratch else config.model,
        library="peft" if config.saves_adapters else "transformers",
        pipeline="text-generation",
        tags=("sft",),
    )


def _start(config: SFTConfig, examples: Sequence[Example]) -> tuple[Any, Any]:
    """The model to train, with adapters if the settings enable them, and its tokenizer."""
    texts = [text for example in examples for text in example.texts()]
    if config.from_scratch:
        tokenizer: Any = train_tokenizer(
            texts, vocab_size=config.sizes.vocab_size, max_length=config.sizes.max_positions
        )
        model = new_causal_lm(config.sizes, tokenizer)
    elif config.saves_adapters and is_adapters(config.model):
        # New adapters need a base on disk, which merged adapters don't have.
        model = with_adapters(_load_base(config), config.model, is_trainable=True)
        tokenizer = load_tokenizer(config.model, setting="model")
    elif config.quantization is not None:
        if is_adapters(config.model):
            raise ConfigError(
                f"quantization={config.quantization} needs a base on disk, and model={config.model!r} holds adapters: "
                "train them on with --no-merge, or merge them into their base first"
            )
        with reading(config.model):
            model = _load_base(config)
            tokenizer = load_tokenizer(config.model, setting="model")
    else:
        with reading(config.model):
            model = load_whole_causal_lm(config.model, setting="model")
            tokenizer = load_tokenizer(config.model, setting="model")
    if config.chat_template is not None or any(example.is_conversation for example in examples):
        use_chat_template(tokenizer, config.chat_template, f"model={config.model!r}")
    if not config.from_scratch:
        _check_start(config, model, tokenizer, texts)
    if config.lora.enabled and not hasattr(model, "peft_config"):
        model = add_lora(model, config.lora)
    return model, tokenizer


def _end_turns(model: Any, tokenizer: Any, rows: Rows) -> None:
    """Make the tokens that end the assistant's turns in the data end tokens of the model, here and in PPO."""
    known = end_tokens(model, tokenizer)
    new = sorted(rows.ends - set(known))
    if new:
        model.generation_config.eos_token_id = [*known, *new]
        print(f"what the model writes ends at {', '.join(tokenizer.convert_ids_to_tokens(new))} as well")


def _base(config: SFTConfig) -> str:
    """The base model of saved adapters."""
    return base_of(config.model) if is_adapters(config.model) else config.model


def _load_base(config: SFTConfig) -> Any:
    """The base model, quantised if the settings say so."""
    if config.quantization is None:
        return load_causal_lm(_base(config), setting="model")
    return load_causal_lm(_base(config), quantization=config.quantization, device=device_named(None), setting="model")


def _rows(config: SFTConfig, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example]) -> Rows:
    """Token rows to train on. Prints what was truncated; raises `ConfigError` if nothing is left."""
    taken = rows_of(tokenizer, examples, config.max_length)
    measured_on = rows_of(tokenizer, held_out, config.max_length)
    for line in taken.lines(config.max_length):
        print(line, flush=True)
    for rows, split in ((taken, "training"), (measured_on, "held-out")):
        if not rows.ids:
            raise ConfigError(
                f"max_length={config.max_length} leaves no token to learn of the {split} examples: their prompts alone "
                "are that long; give --max-length more"
            )
    return taken


def _check_start(config: SFTConfig, model: Any, tokenizer: Any, texts: list[str]) -> None:
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


@torch.no_grad()
def held_out_loss(
    model: Any, rows: Sequence[list[int]], labels: Sequence[list[int]] | None = None, batch_size: int = 32
) -> float:
    """Mean negative log-likelihood (nats) of the tokens of `rows` after each row's first.

    With `labels`, only tokens whose label is not `IGNORED` count.
    """
    total, count = 0.0, 0
    ordered = sorted(zip(rows, rows if labels is None else labels, strict=True), key=lambda pair: len(pair[0]))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids = torch.full((len(batch), len(batch[-1][0])), 0, device=model.device)
        wanted, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, (row, learnt) in enumerate(batch):
            ids[i, : len(row)], wanted[i, : len(row)] = torch.tensor(row), torch.tensor(learnt)
            mask[i, : len(row)] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1).float(), wanted[:, 1:].flatten(), reduction="sum").item()
        count += int((wanted[:, 1:] != IGNORED).sum())
    if not math.isfinite(total):
        raise NotFinite(f"the loss on held-out texts is {total / count}: the model is not saved")
    return total / count


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, seed: int, max_length: int, count: int = 8
) -> list[str]:
    """Samples that continue the first four tokens of held-out texts, or answer held-out prompts: up to 36 tokens in
    all, or 36 new ones."""
    torch.manual_seed(seed)
    in_front = tokens_in_front(tokenizer)
    drawn = []
    for example in examples[:count]:
        prompt = example.prompt_ids(tokenizer)
        if prompt is None:
            ids = tokenizer(example.text, add_special_tokens=False, verbose=False)["input_ids"][:4]
            prompt, length = [*in_front, *ids], min(NEW_TOKENS, max_length)
        else:
            length = min(len(prompt) + NEW_TOKENS, max_length)
        if len(prompt) >= length:
            continue
        row = torch.tensor([prompt], device=model.device)
        settings = {"do_sample": True, "max_length": length, "pad_token_id": tokenizer.pad_token_id}
        drawn.append(model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings)[0])
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in drawn]
