"""Value heads saved beside a model, by Plaudit or by TRL, and other tensors of a model's files by their names.

Failure mode: a value head that is saved and not found again.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from plaudit.policy.saving import VALUE_HEAD_FILE


def saved_value_head(source: str) -> dict[str, Tensor] | None:
    """The value head's `weight` and `bias` beside a model, as Plaudit or TRL saved them; None where there is none."""
    own = _file(source, VALUE_HEAD_FILE)
    if own is not None:
        return _tensors(own)
    return (
        tensors_named("v_head.summary.", source, "model.safetensors", "pytorch_model.bin")
        or tensors_named("v_head.summary.", source, "model.safetensors.index.json")
        or None
    )


def tensors_named(part: str, source: str, *files: str) -> dict[str, Tensor]:
    """The tensors of a model's files whose names hold `part`, by what follows it. An index names the files itself."""
    for name in files:
        path = _file(source, name)
        if path is None:
            continue
        if name.endswith(".index.json"):
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({shard for tensor, shard in places.items() if part in tensor})
            found = {n: t for shard in shards for n, t in tensors_named(part, source, shard).items()}
        else:
            found = {n.rpartition(part)[2]: t for n, t in _tensors(path, part).items()}
        if found:
            return found
    return {}


def _tensors(path: Path, part: str = "") -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if part in name}  # noqa: SIM118
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in loaded.items() if part in name}


def _file(source: str, name: str) -> Path | None:
    """A file of a model directory or of a hub id; None if there is none, or none within reach."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name)
    except OSError:
        return None
    return None if found is None else Path(found)
