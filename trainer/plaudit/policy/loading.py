"""A policy put together from files: model, adapters, reference, value head and value model.

Failure mode: a reference that is the policy itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora, base_of, is_adapters, with_adapters
from plaudit.policy.head import HALVES
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_causal_lm, load_whole_causal_lm
from plaudit.policy.reading import reading
from plaudit.policy.saving import VALUE_HEAD_FILE, VALUE_MODEL_DIRECTORY, load_value_head
from plaudit.policy.transformer import bare
from plaudit.policy.value_model import load_value_model
from plaudit.settings.policy import Dtype, LoraSettings, ModelSettings

COMPILER = "inductor"
DTYPES: Mapping[Dtype, torch.dtype | Literal["auto"]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "auto": "auto",
}
"""What transformers is asked for."""


def load_policy(
    path: str | Path,
    lora: LoraSettings | None = None,
    settings: ModelSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    value_head: bool = True,
) -> Policy:
    """The policy in a directory, or of a hub id: a whole model, or adapters to go on training (with their base).

    A value head saved beside it is loaded too. `lora` off loads a second, frozen copy as the reference. The reference
    of PPO's own adapters, which a value head tells, is their base; other adapters are a stage before PPO, and the
    reference is a frozen copy of the model with them folded in. A separate value model is the one saved beside the
    policy, or else what `value_model` names. Without `value_head` there are no values, and a saved one is not read.
    Raises `ModelNotFound`.
    """
    with reading(path):
        return _load_policy(
            path, lora or LoraSettings(), settings or ModelSettings(), device=device, value_head=value_head
        )


def _load_policy(
    path: str | Path, lora: LoraSettings, settings: ModelSettings, *, device: torch.device | str, value_head: bool
) -> Policy:
    quantization, dtype = settings.quantization, DTYPES[settings.dtype]
    directory = Path(path)
    base: str | Path = path
    reference = value_model = None
    if is_adapters(directory):
        base = base_of(directory)
        whole = load_causal_lm(base, dtype=dtype, quantization=quantization, device=device)
        model = with_adapters(whole, directory, is_trainable=True)
        if not (directory / VALUE_HEAD_FILE).is_file():
            reference = _frozen_start(path, base, whole.dtype, device)
    elif lora.enabled:
        model = add_lora(load_causal_lm(path, dtype=dtype, quantization=quantization, device=device), lora)
    elif quantization is not None:
        raise ConfigError(f"quantization={quantization} trains adapters only: lora.enabled=False cannot go with it")
    else:
        model = load_causal_lm(path, dtype=dtype, device=device)
        if model.dtype in HALVES:
            raise ConfigError(
                f"model.dtype={settings.dtype} loads {path} in {model.dtype}, where small updates are rounded away, "
                "and lora.enabled=False trains these weights: leave model.dtype at fp32 (--model.bf16 computes in bf16)"
            )
        reference = load_causal_lm(path, dtype=dtype, device=device)
    score = None
    own = directory / VALUE_MODEL_DIRECTORY
    if settings.value_source != "shared":
        start = base if settings.value_source == "copy" else settings.value_source
        adapters = lora if settings.value_model_lora else None
        source = own if own.is_dir() else start
        value_model, score = load_value_model(source, lora=adapters, dtype=dtype, device=device)
    policy = Policy(
        model,
        reference=reference,
        value_model=value_model,
        autocast=torch.bfloat16 if settings.bf16 else None,
        logits_mib=settings.logits_mib,
        value_head=value_head,
    )
    # A value head belongs to the states that it was trained on.
    fresh = settings.value_source not in ("shared", "copy") and not own.is_dir()
    foreign = settings.value_source == "shared" and own.is_dir()
    if value_head and score is not None:
        policy.v_head.load_state_dict({"bias": torch.zeros(1), **score.state_dict()})
    elif value_head and (directory / VALUE_HEAD_FILE).is_file() and not (fresh or foreign):
        load_value_head(policy, directory)
    if settings.compile:
        policy.language_model.base_model.compile(backend=COMPILER, dynamic=True)
    if settings.gradient_checkpointing:
        for transformer in (policy.language_model, *([] if value_model is None else [bare(value_model)])):
            # transformers 5.23 gave it this name; before, it has only the other.
            enable = getattr(transformer, "activation_checkpointing_enable", None)
            (enable or transformer.gradient_checkpointing_enable)({"use_reentrant": False})
    return policy


def _frozen_start(path: str | Path, base: str | Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The model that adapters from a stage before PPO make of their base, as the reference.

    In half precision they stay beside their base: folded in, they would be rounded, and the KL would not start at 0.
    """
    if dtype in HALVES:
        adapted: nn.Module = with_adapters(load_causal_lm(base, dtype=dtype, device=device), path)
        return adapted
    folded: nn.Module = load_whole_causal_lm(path, device=device)
    return folded.to(dtype)
