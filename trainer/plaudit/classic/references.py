"""Frozen copies of a model, to hold its policy to.

Failure mode: a reference that moves with the policy.
"""

import copy
from typing import Any

from torch import nn

from plaudit.errors import ConfigError

LAYER_PATTERNS = ("transformer.h.{}.", "model.decoder.layers.{}.", "gpt_neox.layers.{}.", "model.layers.{}.")
"""How architectures name their layers."""


def create_reference_model(model: Any, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """A frozen copy of a model, to hold its policy to.

    With `num_shared_layers`, embeddings and that many first layers are frozen in the model too, and are the same
    tensors in both. `pattern` names a layer, with `{layer}` for its number; known architectures need none.

    Raises:
        ConfigError: no parameter's name fits the pattern, so nobody can tell which layers come first.
    """
    shared: list[nn.Parameter] = []
    if num_shared_layers is not None:
        names = [name for name, _ in model.named_parameters()]
        patterns = LAYER_PATTERNS if pattern is None else (pattern.replace("{layer}", "{}"),)
        first = next((i for p in patterns for i, name in enumerate(names) if p.format(num_shared_layers) in name), None)
        if first is None:
            raise ConfigError(
                f"num_shared_layers={num_shared_layers}: no parameter of {type(model).__name__} belongs to such a "
                "layer; give fewer, or name its layers with pattern='….{layer}.'"
            )
        shared = [parameter.requires_grad_(False) for _, parameter in list(model.named_parameters())[:first]]
    # What is in the memo already is not copied.
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()
