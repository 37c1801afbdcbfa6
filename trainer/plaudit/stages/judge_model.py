"""The sequence classifier of stage 2: loading, adapters, scoring and saving.

Failure modes: an untrained head; texts that are tokenised differently from the reward service; scores on another scale
than the recorded one.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from plaudit import demo_models
from plaudit.data.chat_templates import judged_ids
from plaudit.data.conversations import Prompt
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.parallel.devices import device_named
from plaudit.policy.adapters import add_lora, base_of, is_adapters, on_full_precision
from plaudit.policy.checks import FAILURES, check_tokenizer_fits, max_positions
from plaudit.policy.pretrained import load_tokenizer, load_whole_causal_lm, quantised, require_no_random_weights
from plaudit.policy.reading import reading
from plaudit.policy.transformer import compute_quantised_layers_in_one_way
from plaudit.run.progress import Counting
from plaudit.run.storage import write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.policy import LoraSettings, Quantization
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.stages.supervised import require_same_figures, saved_model

CHARS_PER_TOKEN = 16
"""Upper bound used to cut texts before tokenising; no natural text has longer tokens on average."""
Saved = TypeVar("Saved")
BATCH_SIZE = 64
HEADS = ("score", "classifier", "pre_classifier", "classification_head", "pooler")
"""Names of the layers of heads, which learn whole and are not quantised."""
SHOWN_FROM = 512
"""Number of texts from which on progress is shown."""


def load_classifier(source: str, quantization: Quantization | None = None, **settings: Any) -> tuple[Any, Any]:
    """The initial model with a head for the labels in `settings`, and its tokenizer.

    With `quantization`, its body is quantised, and the head is not.

    The weights are converted to fp32, because small updates vanish and large ones overflow in half precision. A
    language model, or adapters on one, gets a new head.

    Raises:
        ConfigError: the model can't be a classifier, or the adapters have another type.
    """
    adapters = is_adapters(source)
    if adapters and _adapters_task(source) != "CAUSAL_LM":
        raise ConfigError(
            f"model={source!r} holds adapters, and not of a language model: merge them into their base first (peft's "
            "merge_and_unload and save_pretrained) and name the result"
        )
    if adapters and quantization is not None:
        raise ConfigError(
            f"quantization={quantization} needs a base on disk, and model={source!r} holds adapters: merge them into "
            "their base first (`plaudit sft` without --no-merge)"
        )
    try:
        with reading(source):
            tokenizer = load_tokenizer(source, setting="model")
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                demo_models.resolve(base_of(source) if adapters else source),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
                **quantised(quantization, device=device_named(None), keep=HEADS),
                **settings,
            )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model={source!r} can't be loaded as a classifier ({reason:.160}); name another") from error
    require_no_random_weights(model, loaded, source, "model", head_may_be_new=True)
    if quantization is not None:
        compute_quantised_layers_in_one_way(model)
    if adapters:
        body = load_whole_causal_lm(source, setting="model").base_model
        model.base_model.load_state_dict(body.state_dict())
    model.config.problem_type = settings["problem_type"]
    vars(model.config).pop("score_scale", None)  # it belongs to the initial model
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@torch.no_grad()
def check_start(config: RewardModelConfig, model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Check that a short text and one of maximum length get the same scores alone and together."""
    name = f"model={config.model!r}" if not config.from_scratch else f"sizes.model_type={config.sizes.model_type!r}"
    check_tokenizer_fits(tokenizer, model, config.model, texts, setting="model")
    was_training, probe = model.training, ["good film", "a good film " * config.max_length]
    model.eval()
    try:
        together = logits(model, tokenizer, probe, config.max_length)
        alone = torch.cat([logits(model, tokenizer, [text], config.max_length) for text in probe])
    except FAILURES as error:
        raise ConfigError(
            f"{name} can't judge a text of max_length={config.max_length} tokens ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.100}); its configuration names {max_positions(model)} positions, of which "
            "some families keep a few for themselves: give --max-length less, or name another model"
        ) from error
    finally:
        model.train(was_training)
    tolerance = 1e-3 if config.quantization is None else 5e-2
    if bool((together - alone).abs().max() > tolerance * together.abs().max().clamp(min=1e-3)):
        raise ConfigError(
            f"{name} judges a text otherwise beside a longer one than alone ({alone[0].tolist()} alone, "
            f"{together[0].tolist()} beside it): it reads padding; give its tokenizer the padding_side that it was "
            "trained with, or name another model"
        )


def _adapters_task(source: str) -> Any:
    file = Path(demo_models.resolve(source)) / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("task_type")


def with_adapters(model: Any, lora: LoraSettings) -> Any:
    """The model with new adapters on its body and a fully trained head; unchanged if adapters are off.

    The adapters are merged before the model is saved (`without_adapters`), so any server can load it.
    """
    if not lora.enabled:
        return model
    head = [name for name, child in model.named_children() if name != model.base_model_prefix and _learns(child)]
    pooler = ["pooler"] if any(name.rpartition(".")[2] == "pooler" for name, _ in model.named_modules()) else []
    return add_lora(model, lora, task_type="SEQ_CLS", modules_to_save=[*head, *pooler])


def without_adapters(model: Any, full_precision: Callable[[], Any] | None = None) -> Any:
    """The model with its adapters merged, into the base that `full_precision` loads if its own is quantised."""
    if full_precision is not None:
        model = on_full_precision(model, full_precision().to(model.device))
    return model.merge_and_unload().requires_grad_(True) if hasattr(model, "merge_and_unload") else model


def _learns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@torch.no_grad()
def scale_scores(model: Any, factor: float) -> None:
    """Multiply the head's weights by `factor`, which scales every score of a model with one score.

    Raises:
        ConfigError: its head does not end in a linear layer.
    """
    last = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and not _in_body(model, name)
    ]
    if len(last) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(last)} linear layers that give one number, so its scores can't be scaled "
            "in its weights: pass --scale-on none"
        )
    last[0].weight.mul_(factor)
    if last[0].bias is not None:
        last[0].bias.mul_(factor)


def _in_body(model: Any, name: str) -> bool:
    return name.startswith(f"{model.base_model_prefix}.")


def save_classifier(
    config: RewardModelConfig,
    model: Any,
    tokenizer: Any,
    figures: Callable[[Any, Any], Tensor],
    finish: Callable[[Any, Path], Saved],
) -> Saved:
    """Save the model, check that it can be loaded again, and return the result of `finish`.

    `figures` computes some logits of a model and tokenizer, which must be the same before and after. `finish` receives
    the model in fp32 with the saved weights, and the directory for the stage's report (`write_report`).
    """

    def reproduces(directory: Path) -> None:
        again = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).to(model.device)
        if again.config.id2label != model.config.id2label:
            raise NotAsSaved(f"the model is not saved: loaded again, its labels are {again.config.id2label}")
        own, got = figures(model, tokenizer), figures(again.eval(), load_tokenizer(directory))
        require_same_figures("the logits of held-out texts", own, got)

    with saved_model(
        model, tokenizer, config.output_dir, half_precision=config.half_precision, reproduces=reproduces
    ) as (model, beside):
        return finish(model, beside)


def write_report(directory: Path, config: RewardModelConfig, held_out: Mapping[str, Any], **more: Any) -> None:
    """Write reward_model.json: settings and held-out metrics."""
    figures = {name: asdict(judged) for name, judged in held_out.items()}
    report = {"stage": "reward-model", "config": to_dict(config), "held_out": figures, **more}
    write_text(directory / "reward_model.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Token ids and attention mask, [B, T], of texts truncated to `max_length` tokens."""
    cut = [text[: CHARS_PER_TOKEN * max_length] for text in texts]
    batch = tokenizer(cut, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = BATCH_SIZE) -> Tensor:
    """Raw logits [N, labels] of texts in their order, computed in batches of similar length."""
    return _in_batches(
        model,
        [len(text) for text in texts],
        lambda chosen: encode(tokenizer, [texts[i] for i in chosen], max_length),
        batch_size,
    )


@torch.no_grad()
def scores(model: Any, tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str], max_length: int) -> Tensor:
    """The scores [N] of answers to prompts, in their order, by a model with one score."""
    ids = judged_ids(tokenizer, prompts, answers, max_length)
    return _in_batches(
        model, [len(row) for row in ids], lambda chosen: padded(tokenizer, [ids[i] for i in chosen]), BATCH_SIZE
    )[:, 0]


def _in_batches(
    model: Any, lengths: Sequence[int], batch_of: Callable[[Sequence[int]], dict[str, Tensor]], batch_size: int
) -> Tensor:
    """Logits of N rows in their order, computed in batches of similar length. Shows progress for many rows."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found = []
    with Counting("texts scored", len(order)) if len(order) > SHOWN_FROM else contextlib.nullcontext() as counting:
        for start in range(0, len(order), batch_size):
            batch = batch_of(order[start : start + batch_size])
            found.append(model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits)
            if counting is not None:
                counting.add(len(found[-1]))
    result = torch.cat(found).float().cpu()
    if not bool(result.isfinite().all()):
        raise NotFinite("the model's logits are not finite: its weights are damaged, so it is neither judged nor saved")
    return result[torch.argsort(torch.tensor(order))]


def padded(tokenizer: Any, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of token ids as tensors [B, T], with the attention mask."""
    batch = tokenizer.pad({"input_ids": [list(row) for row in ids]}, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
