"""A policy that only writes: a whole model or adapters, its tokenizer, and a name for exactly these weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.policy.model import load_causal_lm, load_tokenizer

WEIGHTS = ("adapter_model*", "adapter_config.json", "model*.safetensors", "pytorch_model*.bin", "config.json")
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Writer:
    """`model` is a bare causal language model, in which adapters, if there are any, are active."""

    model: Any
    tokenizer: Any
    revision: str
    """A hash of the weights in the directory; empty for a model of a hub that doesn't say."""


def load_writer(path: str | Path, *, device: torch.device | str = "cpu") -> Writer:
    """The policy of a directory or hub id. Adapters bring their base and its tokenizer.

    Raises:
        ConfigError: there is none, or the adapters don't say which model they belong to.
    """
    directory = Path(demo_models.resolve(path))
    if not (directory / "adapter_config.json").is_file():
        model = load_causal_lm(path, device=device).eval()
        own = revision_of(directory) if directory.is_dir() else getattr(model.config, "_commit_hash", None) or ""
        return Writer(model, load_tokenizer(path), own)
    base = peft.PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    if not base:
        raise ConfigError(f"policy={str(path)!r} holds adapters that don't say which model they belong to")
    model = peft.PeftModel.from_pretrained(load_causal_lm(base, device=device), str(directory)).eval()
    return Writer(model.get_base_model(), load_tokenizer(base), revision_of(directory))


def revision_of(directory: Path) -> str:
    """A hash of the weight files: the same for a copy of the directory, another one as soon as a weight changes."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in directory.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]
