"""The optimizer of stages 1 and 2: AdamW, or Muon on the weight matrices and AdamW on the rest."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from plaudit.settings.supervised import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW over every trainable parameter; with `muon_learning_rate`, Muon over the hidden layers' matrices instead.

    Embeddings, output layers, biases and norms stay with AdamW: Muon orthogonalises updates, which fits linear maps
    between hidden states only (Jordan et al. 2024). The learning rate must have been chosen.
    """
    assert settings.learning_rate is not None
    adamw = functools.partial(
        torch.optim.AdamW, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if settings.muon_learning_rate is None:
        return adamw(trainable.values())
    outer = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding) or prefix.rpartition(".")[2] in {"lm_head", "classifier", "score"}
        for name, _ in module.named_parameters(recurse=False)
    }
    matrices = [p for name, p in trainable.items() if p.ndim == 2 and name not in outer]
    rest = [p for name, p in trainable.items() if p.ndim != 2 or name in outer]
    muon = torch.optim.Muon(
        matrices,
        lr=settings.muon_learning_rate,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="original",
    )
    return _Together(muon, adamw(rest))


class _Together(torch.optim.Optimizer):
    """Several optimizers that step as one. Parameter groups are shared, so a schedule moves all of them."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # A schedule writes learning rates to our groups, and the members must read them there.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()
