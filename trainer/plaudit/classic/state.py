"""A trainer's state, for programs that save and resume.

Failure mode: a resumed run that draws other random numbers, or learns at another rate, than one that was never stopped.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from plaudit.classic.controllers import AdaptiveKLController, FixedKLController
from plaudit.learner.stepper import PPOStepper


class Resumable(Protocol):
    """The parts of a `PPOTrainer` that change from step to step."""

    stepper: PPOStepper
    kl_ctl: AdaptiveKLController | FixedKLController
    lr_scheduler: Any

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the policy's weights."""
        ...


def trainer_state(trainer: Resumable) -> dict[str, Any]:
    """Everything but the model's weights and the batch that the next `generate` and `step` depend on."""
    scheduler = trainer.lr_scheduler
    return {
        "stepper": trainer.stepper.state_dict(),
        "rates": [float(group["lr"]) for group in trainer.optimizer.param_groups],
        "kl_coef": trainer.kl_ctl.value,
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
    }


def restore_trainer(trainer: Resumable, state: Mapping[str, Any]) -> None:
    """Goes on from `trainer_state`, once the model has the weights of that moment."""
    trainer.stepper.load_state_dict(state["stepper"])
    for group, rate in zip(trainer.optimizer.param_groups, state["rates"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    trainer.kl_ctl.value = state["kl_coef"]
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
