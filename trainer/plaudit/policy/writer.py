"""A policy for inference only: a full model or adapters, its tokenizer, and a hash of its weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from plaudit import demo_models
from plaudit.policy.adapters import base_of, is_adapters, load_adapters
from plaudit.policy.checks import check_policy, check_prompts, check_tokenizer_fits
from plaudit.policy.endings import Endings
from plaudit.policy.generation import Draws, generate
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_causal_lm, load_tokenizer
from plaudit.policy.reading import reading
from plaudit.policy.tokenizer import Tokenizer
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.settings.policy import GenerationSettings

WEIGHTS = ("adapter_model*", "adapter_config.json", "model*.safetensors", "pytorch_model*.bin", "config.json")
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Writer:
    """A policy that generates answers. `model` is a plain causal language model with any adapters active."""

    source: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    cached: bool
    """Whether sampling uses the model's cache."""
    revision: str
    """A hash of the directory's weights, or the hub's commit; empty if unknown."""

    def answer(self, queries: Sequence[Sequence[int]], draws: Draws, settings: GenerationSettings) -> list[str]:
        """One answer to each query, as text."""
        draw = generate if self.cached else generate_uncached
        samples = draw(self.model, queries, draws, settings, self.tokenizer)
        return Endings.of(self.model, self.tokenizer, settings).texts(samples)

    def check(self, queries: Sequence[Sequence[int]], texts: Sequence[str], settings: GenerationSettings) -> None:
        """Raises `ConfigError` if prompts don't fit into the model, or the tokenizer belongs to another model."""
        check_tokenizer_fits(self.tokenizer, self.model, self.source, texts)
        check_prompts(self.tokenizer, self.model, queries, settings, self.source)


def load_writer(path: str, *, device: torch.device | str = "cpu") -> Writer:
    """Load the policy of a directory or hub id. For adapters, also load their base and its tokenizer.

    Raises:
        ConfigError: there is no model, the adapters don't name their base, or the model can't sample.
    """
    with reading(path):
        return _load_writer(path, device)


def _load_writer(path: str, device: torch.device | str) -> Writer:
    directory = Path(demo_models.resolve(path))
    if is_adapters(path):
        base = load_causal_lm(base_of(path), device=device)
        model = load_adapters(base, directory).get_base_model()
    else:
        model = load_causal_lm(path, device=device)
    revision = revision_of(directory) if directory.is_dir() else getattr(model.config, "_commit_hash", None) or ""
    cached = check_policy(Policy(model).eval(), path)
    return Writer(path, model.eval(), load_tokenizer(path), cached, revision)


def revision_of(directory: Path) -> str:
    """A hash of the weight files: equal for copies of a directory, different if any weight differs."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in directory.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]
