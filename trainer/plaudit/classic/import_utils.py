"""What is installed and which devices there are, under the names of `trl.import_utils` and of transformers."""

import importlib.util

from transformers.utils import is_peft_available, is_torch_npu_available, is_torch_xpu_available

__all__ = [
    "is_diffusers_available",
    "is_liger_kernel_available",
    "is_llmblender_available",
    "is_npu_available",
    "is_peft_available",
    "is_rich_available",
    "is_torch_npu_available",
    "is_torch_xpu_available",
    "is_unsloth_available",
    "is_wandb_available",
    "is_xpu_available",
]


def is_xpu_available() -> bool:
    """Whether torch sees an Intel GPU."""
    return bool(is_torch_xpu_available())


def is_npu_available() -> bool:
    """Whether torch sees an Ascend NPU."""
    return bool(is_torch_npu_available())


def is_wandb_available() -> bool:
    """Whether Weights & Biases is installed."""
    return _installed("wandb")


def is_rich_available() -> bool:
    """Whether rich is installed."""
    return _installed("rich")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _installed("diffusers")


def is_unsloth_available() -> bool:
    """Whether unsloth is installed."""
    return _installed("unsloth")


def is_liger_kernel_available() -> bool:
    """Whether liger_kernel is installed."""
    return _installed("liger_kernel")


def is_llmblender_available() -> bool:
    """Whether llm_blender is installed."""
    return _installed("llm_blender")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
