"""Fully sharded data parallelism (FSDP): each process keeps a part of every weight, its gradient and optimizer state.

Used only by `Processes`. Failure modes: gradients are averaged instead of summed; a process runs one more forward pass
than the others and waits forever in its all-gather.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from plaudit.errors import ConfigError
from plaudit.policy.model import Policy


@dataclass(frozen=True)
class Sharding:
    """How the weights are sharded."""

    reshard_after_forward: bool = True
    """Drop the gathered weights after a forward pass, and all-gather them again for the backward pass."""
    blocks: tuple[str, ...] = ()
    """Classes of the modules that are gathered as one; empty for the blocks that the model itself names."""


def shard(policy: Policy, sharding: Sharding) -> None:
    """Splits all weights of the policy and its reference over all processes, in place. See `Processes.shard`."""
    everybody = dist.group.WORLD
    assert everybody is not None
    mesh = DeviceMesh.from_group(everybody, policy.device.type)
    for transformer in policy.transformers:
        names = sharding.blocks or tuple(transformer._no_split_modules or ())
        # From the inside out.
        blocks = [module for module in transformer.modules() if type(module).__name__ in names][::-1]
        if not blocks:
            kind = type(transformer).__name__
            raise ConfigError(f"fsdp_transformer_layer_cls_to_wrap={','.join(names)!r}: {kind} has no such modules")
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    for root in _roots(policy):
        fully_shard(root, mesh=mesh, reshard_after_forward=False)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                # The loss is already a mean over the whole mini-batch: the reduce-scatter sums gradients.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered_weights(policy: Policy, sharding: Sharding) -> Iterator[None]:
    """All-gathers the weights for the length of the block, so that no process waits for another at each token."""
    roots, blocks = _units(policy)
    try:
        for unit in (*roots, *blocks):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
        for root in roots:
            # FSDP keeps the order of forward passes for the backward pass to come, which a reference never has. Older
            # versions of torch can't forget it: the list grows, and nothing else changes.
            if hasattr(root, "reset_iter_state"):
                root.reset_iter_state()
    finally:
        for unit in (*roots, *blocks):
            unit.reshard()
        for block in blocks:
            block.set_reshard_after_forward(sharding.reshard_after_forward, recurse=False)


def memory_line(policy: Policy) -> str:
    """How much of the weights this process holds, for people."""
    parameters = [parameter for root in _roots(policy) for parameter in root.parameters()]
    own, everything = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
        for tensors in ([p.to_local() for p in parameters if isinstance(p, DTensor)], parameters)
    )
    return f"weights are sharded: this process holds {own:,.2f} of {everything:,.2f} MiB, and all during rollouts"


def _units(policy: Policy) -> tuple[list[FSDPModule], list[FSDPModule]]:
    """The modules whose weights are gathered as one: roots, and the blocks within them."""
    roots = _roots(policy)
    units = [module for root in roots for module in root.modules() if isinstance(module, FSDPModule)]
    return [unit for unit in units if unit in roots], [unit for unit in units if unit not in roots]


def _roots(policy: Policy) -> list[nn.Module]:
    return [*policy.transformers, *([] if policy.v_head is None else [policy.v_head])]
