"""Low-rank adapters: fresh ones on a model, or those in a directory, with the model they belong to.

Failure mode: adapters that could not be folded into their base, or that only this program can load; responses that
don't end, because the base doesn't know the end tokens that its adapters have learnt.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import peft
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

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
    """`load_adapters`. Raises `ConfigError` if the adapters could not be folded in."""
    reasons = unadaptable(base)
    model = load_adapters(base, directory, is_trainable=is_trainable)
    require_adaptable(model.targeted_module_names, reasons, str(directory), "train adapters on other layers")
    return model


def load_adapters(base: PreTrainedModel, directory: str | Path, *, is_trainable: bool = False) -> peft.PeftModel:
    """The base with the adapters in a directory, and with the generation settings beside them, if there are any."""
    model: peft.PeftModel = peft.PeftModel.from_pretrained(base, str(directory), is_trainable=is_trainable)
    if (Path(directory) / GENERATION_CONFIG_NAME).is_file():
        base.generation_config = GenerationConfig.from_pretrained(str(directory))
    return model


def on_full_precision(trained: peft.PeftModel, base: PreTrainedModel) -> peft.PeftModel:
    """Adapters, and the modules that learnt whole beside them, on the unquantised weights of their base."""
    settings = copy.deepcopy(trained.peft_config["default"])
    with warnings.catch_warnings():
        # A quantised GPT-2 has no Conv1D layers, and its base has; peft handles both.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        model = peft.get_peft_model(base, settings)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(trained))
    if hasattr(base, "generation_config"):  # a classifier has none
        base.generation_config = trained.get_base_model().generation_config
    return model


def save_generation_settings(model: peft.PeftModel, directory: Path) -> None:
    """Writes the generation settings of a model beside its saved adapters, so that they keep its end tokens.

    As JSON, not by transformers' own `save_pretrained`, which refuses settings that many models have.
    """
    settings = model.get_base_model().generation_config
    if settings is not None:
        settings.to_json_file(directory / GENERATION_CONFIG_NAME)


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
