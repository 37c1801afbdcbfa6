"""Which layers of a model get adapters, where nobody names them.

Failure modes: adapters on a layer whose weight is read without calling the layer, which therefore change nothing;
adapters on a weight that several layers share, where merging them adds each layer's change to all.
"""

from collections import defaultdict
from collections.abc import Collection

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS_BY_FAMILY
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plaudit.errors import ConfigError

ALL_LINEAR = "all-linear"
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""In a mixture of experts, peft takes layers of these names for those of experts, and can't adapt them with dropout."""


def default_targets(model: PreTrainedModel) -> str | list[str]:
    """What `peft.LoraConfig(target_modules=…)` should be for this model.

    peft's own choice for the family, if it has one; or else all linear layers but the output head, those of experts,
    and those that can't be adapted.
    """
    of_family = TARGETS_BY_FAMILY.get(model.config.model_type)
    if of_family is not None:
        return list(of_family)
    left_out = {*_read_without_a_call(model), *_sharing_weights(model)}
    experts = _has_experts(model)
    if not left_out and not experts:
        return ALL_LINEAR
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name not in left_out
        and name.partition(".")[0] not in SEQ_CLS_HEAD_NAMES
        and not (experts and name.rpartition(".")[2] in EXPERT_LAYERS)
    ]


def unadaptable(model: PreTrainedModel) -> dict[str, str]:
    """Layers that can't be adapted, by name, and why."""
    fused = dict.fromkeys(_read_without_a_call(model), "its mixer reads the weight without calling the layer")
    return {**fused, **dict.fromkeys(_sharing_weights(model), "other layers share its weight")}


def require_adaptable(names: Collection[str], reasons: dict[str, str], source: str, remedy: str) -> None:
    """Raises `ConfigError` if one of the layers `names` is one that `unadaptable` gave a reason for."""
    for name in sorted(set(names) & reasons.keys()):
        raise ConfigError(f"{source}: adapters on {name} can't be right, since {reasons[name]}; {remedy}")


def _read_without_a_call(model: nn.Module) -> list[str]:
    """Layers of Mamba's mixers but for the first: fused kernels take their weights alone."""
    return [
        f"{path}.{name}"
        for path, mixer in model.named_modules()
        if hasattr(mixer, "A_log") and isinstance(getattr(mixer, "in_proj", None), nn.Linear)
        for name, layer in mixer.named_modules()
        if isinstance(layer, nn.Linear) and name != "in_proj"
    ]


def _sharing_weights(model: nn.Module) -> list[str]:
    """Linear layers with the same weight as another one, as in Zamba2's shared transformer."""
    by_weight: dict[int, list[str]] = defaultdict(list)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            by_weight[id(layer.weight)].append(path)
    return [name for names in by_weight.values() if len(names) > 1 for name in names]


def _has_experts(model: nn.Module) -> bool:
    return any(
        path.endswith("experts") and any(parameter.ndim == 3 for parameter in module.parameters())
        for path, module in model.named_modules()
    )
