"""A policy as files: adapters or a whole model, the value head, and a value model if it has one.

Failure mode: a file that holds other weights than the policy, or weights that are not finite.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from plaudit.errors import NotAsSaved, NotFinite
from plaudit.policy.adapters import save_generation_settings
from plaudit.policy.model import Policy

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_DIRECTORY = "value_model"


@dataclass(frozen=True)
class PolicyWeights:
    """Whole tensors by their names, as `save_policy` writes them."""

    model: dict[str, Tensor]
    """Of the adapters, or of the whole model where there are none."""
    value_head: dict[str, Tensor]
    """Empty where there is none, as is `value_model`."""
    value_model: dict[str, Tensor]


def save_policy(policy: Policy, directory: Path, weights: PolicyWeights | None = None) -> None:
    """Adapters that `peft.PeftModel.from_pretrained` loads, or a whole transformers model; and the value head.

    `weights` are the policy's own; give them where it holds only a part of each (`Processes.full_weights_on_main`).
    """
    policy.model.save_pretrained(directory, state_dict=weights and weights.model)
    if policy.has_adapters:
        save_generation_settings(policy.model, directory)
    if policy.value_model is not None:
        own = directory / VALUE_MODEL_DIRECTORY
        policy.value_model.save_pretrained(own, state_dict=weights and weights.value_model)
    head = _value_head(policy, weights)
    if head:
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, directory / VALUE_HEAD_FILE)


def check_saved(policy: Policy, directory: Path, weights: PolicyWeights | None = None) -> None:
    """Proves that `directory` holds what `save_policy` was given: every tensor is read again, and is finite.

    Raises:
        NotFinite: a weight is not finite.
        NotAsSaved: a file lacks a tensor, or holds another.
    """
    if policy.has_adapters:
        whole = peft.get_peft_model_state_dict(policy.model, state_dict=weights and weights.model)
    else:
        whole = _as_saved(policy.model, None if weights is None else weights.model)
    head = _value_head(policy, weights)
    _require_saved(directory, {**whole, **head}, some_are_tied=not policy.has_adapters)
    if policy.value_model is not None:
        given = None if weights is None else weights.value_model
        adapted = isinstance(policy.value_model, peft.PeftModel)
        if adapted:
            own = peft.get_peft_model_state_dict(policy.value_model, state_dict=given)
        else:
            own = _as_saved(policy.value_model, given)
        _require_saved(directory / VALUE_MODEL_DIRECTORY, own, some_are_tied=not adapted)


def _value_head(policy: Policy, weights: PolicyWeights | None) -> Mapping[str, Tensor]:
    """The value head's tensors; none of a policy without one."""
    if weights is not None:
        return weights.value_head
    return {} if policy.v_head is None else policy.v_head.state_dict()


def load_value_head(policy: Policy, directory: Path) -> None:
    """The value head that `save_policy` wrote."""
    policy.v_head.load_state_dict(load_file(directory / VALUE_HEAD_FILE))


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises `NotFinite` with the name of the first tensor that holds NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotFinite(f"{what} is not saved: its weight {name} ({tensor.dtype}) is not finite")


def _as_saved(model: PreTrainedModel, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """A whole model's tensors under the names and in the shapes that transformers saves them in, experts one by one."""
    saved: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict() if weights is None else weights)
    return saved


def _require_saved(directory: Path, expected: Mapping[str, Tensor], *, some_are_tied: bool) -> None:
    """Raises `NotFinite` or `NotAsSaved` unless a directory's files hold these tensors; of tied ones, one is enough."""
    read = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    require_finite(read.items(), str(directory))
    lacking = [] if some_are_tied else sorted(expected.keys() - read.keys())
    differing = sorted(n for n in read if n not in expected or not torch.equal(read[n], expected[n].cpu()))
    if lacking or differing or not read:
        problem = f"{(lacking or differing)[0]} is not in it" if read else "there are no weights in it"
        raise NotAsSaved(f"{directory} was not written as it should be: {problem}")
