"""Low-rank adapters: fresh ones on a model, or those in a directory, with the model they belong to.

Failure mode: adapters that could not be folded into their base, or that only this program can load.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import peft
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.policy.lora_targets import default_targets, require_adaptable, unadaptable
from plaudit.policy.reading import reading, settle
from plaudit.settings.policy import LoraSettings


def add_lora(
    model: PreTrainedModel,
    lora: LoraSettings,
    *,
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"] = "CAUSAL_LM",
    modules_to_save: Sequence[str] = (),
) -> peft.PeftModel:
    """Wraps the model with fresh adapters, which start as the identity. `modules_to_save` learn whole beside them.

    Raises:
        ConfigError: no adapters can be put on it.
    """
    targets = list(lora.target_modules) if lora.target_modules else default_targets(model)
    reasons = unadaptable(model)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task_type,
        modules_to_save=list(modules_to_save) or None,
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"lora: no adapters can be put on {type(model).__name__} ({' '.join(str(error).split()):.200}); name "
            "others with --lora.target-modules, try --lora.dropout 0, or train all parameters with --lora.no-enabled"
        ) from error
    remedy = "leave that one out, or give no --lora.target-modules to have layers chosen that can be adapted"
    require_adaptable(adapted.targeted_module_names, reasons, "lora.target_modules", remedy)
    return adapted


def with_adapters(base: PreTrainedModel, directory: str | Path, *, is_trainable: bool = False) -> peft.PeftModel:
    """The base with the adapters in a directory. Raises `ConfigError` if they could not be folded in."""
    reasons = unadaptable(base)
    model = peft.PeftModel.from_pretrained(base, str(directory), is_trainable=is_trainable)
    require_adaptable(model.targeted_module_names, reasons, str(directory), "train adapters on other layers")
    return model


def is_adapters(path: str | Path) -> bool:
    """Whether this is a directory of adapters, which are nothing without the model they were trained on."""
    settle(path)
    return (Path(demo_models.resolve(path)) / "adapter_config.json").is_file()


def base_of(adapters: str | Path) -> str:
    """The model that the adapters in a directory belong to. Raises `ConfigError` if they don't say."""
    with reading(adapters):
        base = peft.PeftConfig.from_pretrained(demo_models.resolve(adapters)).base_model_name_or_path
    if not base:
        raise ConfigError(f"{adapters}: the adapters do not say which model they belong to")
    return str(base)
