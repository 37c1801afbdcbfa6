"""Adapters folded into the weights of their base, for plain transformers.

Failure mode: a merged model that, loaded again, is another one.
"""

import tempfile
from pathlib import Path

import torch

from plaudit.errors import NotAsSaved
from plaudit.policy.adapters import base_of, with_adapters
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_causal_lm
from plaudit.policy.saving import VALUE_HEAD_FILE, PolicyWeights, check_saved, require_finite, save_policy


def merge_policy(policy: Policy, directory: Path, weights: PolicyWeights | None = None) -> None:
    """Writes the model with its adapters folded in, as a directory that plain transformers loads."""
    directory.mkdir(parents=True, exist_ok=True)
    if not policy.has_adapters:
        save_policy(policy, directory, weights)
        check_saved(policy, directory, weights)
        return
    with tempfile.TemporaryDirectory(dir=directory) as adapters:
        save_policy(policy, Path(adapters), weights)
        merge_adapters(Path(adapters), directory)


def merge_adapters(adapters: Path, directory: Path) -> None:
    """Folds a directory of adapters into the full-precision weights of their base, quantised in training or not."""
    base = load_causal_lm(base_of(adapters), dtype="auto")
    model = with_adapters(base, adapters).merge_and_unload()
    require_finite(model.named_parameters(), "the merged model")
    model.save_pretrained(directory)
    again = load_causal_lm(directory, dtype="auto").state_dict()
    expected = model.state_dict()
    differing = {name for name in expected if name not in again or not torch.equal(again[name], expected[name])}
    if differing or again.keys() - expected.keys():
        name = min(differing or again.keys() - expected.keys())
        raise NotAsSaved(f"{directory}: the merged model, loaded again, has another {name}")
    value_head = adapters / VALUE_HEAD_FILE
    if value_head.is_file():
        (directory / VALUE_HEAD_FILE).write_bytes(value_head.read_bytes())
