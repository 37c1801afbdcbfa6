"""A Hugging Face model as PPO computes with it: without dropout, with fused activations, with or without adapters."""

import re
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation


def bare(model: Any) -> Any:
    """The Hugging Face model in a model that may have adapters. They act in it; only their switches are outside."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def head_of(model: Any) -> Any:
    """The output head: states [..., H] to logits [..., V]."""
    return bare(model).get_output_embeddings()


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability in the model to 0, in modules and plain attributes; the config is left alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and re.search(r"dropout|pdrop", name):
                setattr(module, name, 0.0)


def fuse_activations(model: nn.Module) -> None:
    """GPT-2's GELU as one kernel in place of eight: the same tanh approximation, equal to a rounding of fp32."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def compute_quantised_layers_in_one_way(quantised: PreTrainedModel) -> None:
    """Keeps quantised layers in training mode for good.

    On CPUs bitsandbytes evaluates in another precision than it trains in, so that updates would start with a ratio
    that is not 1. With AVX512-BF16 it would repack 4-bit weights for that, and fail for layers narrower than a block.
    """
    import bitsandbytes

    for module in quantised.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            module.training = True
            module.train = lambda mode=True, module=module: module


def numel(parameter: nn.Parameter) -> int:
    """How many numbers it stands for, however they are packed."""
    # A 4-bit weight is stored two to a byte; its quantisation state knows the real shape.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
