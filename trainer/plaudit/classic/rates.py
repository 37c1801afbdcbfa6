"""Learning rates that a program's scheduler sets, and that the step must leave alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def rates_left_alone(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The stepper sets each rate from `initial_lr`; in the block that is the rate which a scheduler has set."""
    initial = [group.get("initial_lr") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            if rate is None:
                del group["initial_lr"]
            else:
                group["initial_lr"] = rate
