"""PPO's optimizer, its learning rates, and its state in a checkpoint.

Failure modes: a learning-rate tensor that is replaced while a recorded graph reads the old one, or one device's choice
of kernels carried over to another.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.parallel.processes import Processes
from plaudit.policy.model import Policy
from plaudit.settings.ppo import LearningRateSchedule, PPOHyperparameters

OWN_OPTIONS = ("fused", "foreach", "capturable", "lr")
"""Options that a loaded checkpoint leaves as they are: the choice of kernels, and the rate, which each step sets."""


def make_optimizer(policy: Policy, config: PPOHyperparameters, processes: Processes) -> torch.optim.Adam:
    """Adam without weight decay over everything that learns. The value head may have its own learning rate."""
    modules = [module for module in (policy.v_head, policy.value_model) if module is not None]
    head = {id(parameter) for module in modules for parameter in module.parameters()}
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    rate, head_rate = config.learning_rate, config.value_head_learning_rate
    groups: list[dict[str, Any]] = [{"params": learning, "lr": rate, "initial_lr": rate}]
    if head_rate is not None and head:
        groups = [
            {"params": [p for p in learning if id(p) not in head], "lr": rate, "initial_lr": rate},
            {"params": [p for p in learning if id(p) in head], "lr": head_rate, "initial_lr": head_rate},
        ]
    # One kernel for all parameters; sharded ones have none.
    fused = True if policy.device.type == "cuda" and not processes.is_sharded else None
    if fused:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=policy.device)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.Adam(groups, betas=betas, eps=config.adam_eps, fused=fused, capturable=bool(fused))


def step_unless(optimizer: Any, found_inf: Tensor) -> None:
    """Moves the weights unless `found_inf` [] is above 0, which the host does not read.

    This is how `torch.amp.GradScaler` tells a fused optimizer to skip a step: by attributes that are not documented.
    Use it only where `skips_on_found_inf` says that they work.
    """
    optimizer.grad_scale, optimizer.found_inf = None, found_inf
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


@functools.cache
def skips_on_found_inf(device_type: str) -> bool:
    """Whether `step_unless` works with this version of torch on such a device: tried once, on a weight of its own."""
    with torch.enable_grad():
        weight = nn.Parameter(torch.ones(1, device=device_type))
    weight.grad = torch.ones_like(weight)
    moved = []
    try:
        adam = torch.optim.Adam([weight], fused=True, capturable=device_type == "cuda")
        for found_inf in (1.0, 0.0):
            before = weight.detach().clone()
            step_unless(adam, torch.tensor(found_inf, device=device_type))
            moved.append(bool((weight != before).any()))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return moved == [False, True] and all(float(state["step"]) == 1 for state in adam.state.values())


def learning_rate_factor(
    step: int, schedule: LearningRateSchedule, *, warmup_steps: int = 0, total_steps: int | None = None
) -> float:
    """The learning rate's factor in step `step` (from 0): linear warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    assert total_steps is not None
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group's rate to its initial rate times `factor`; returns the first group's."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # in place: a recorded graph may read it
        else:
            group["lr"] = rate
    return float(optimizer.param_groups[0]["initial_lr"] * factor)


def state_for_files(optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Any]:
    """The optimizer's state with full tensors. All processes call this; if sharded, only rank 0 gets the tensors."""
    state = optimizer.state_dict()
    return {
        "state": _tensors(state["state"], lambda _, moment: processes.full_tensor_on_main(moment)),
        "param_groups": [group | {"lr": float(group["lr"])} for group in state["param_groups"]],
    }


def restore_state(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    saved: Mapping[str, Any],
    processes: Processes,
) -> None:
    """Puts back what `state_for_files` gave; `parameters` in the optimizer's order."""
    own = _tensors(
        saved["state"], lambda i, moment: processes.own_shard(moment, parameters[i]) if moment.ndim else moment
    )
    # The choice of kernels is this process's, not that of the one which wrote the file.
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    groups = [group | {name: current[name] for name in OWN_OPTIONS} for group, current in pairs]
    optimizer.load_state_dict({"state": own, "param_groups": groups})


def _tensors(
    states: Mapping[int, Mapping[str, Tensor]], change: Callable[[int, Tensor], Tensor]
) -> dict[int, dict[str, Tensor]]:
    """An optimizer's state, with `change(index, tensor)` in place of each tensor; `index` is its parameter's."""
    return {i: {name: change(i, tensor) for name, tensor in state.items()} for i, state in states.items()}
