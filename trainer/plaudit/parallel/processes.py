"""The processes of one run. Each takes a share of every batch, and all compute the same numbers.

`Processes` is the one object that knows whether a run has one process or several, and whether weights are replicated
or sharded. Everything that depends on it takes it as an argument and calls it in either case; alone, it does nothing.

Failure modes: an average of averages instead of one average (rows are gathered before statistics are computed); a
process waits for one that has failed (errors are exchanged with every collective operation).
"""

import functools
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from plaudit.parallel import sharding as fsdp
from plaudit.parallel.sharding import Sharding
from plaudit.policy.model import Policy
from plaudit.policy.saving import PolicyWeights

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all that make one run, and how they hold the weights.

    Every method but `share` and `largest_share` is a collective operation: all processes call it, in the same order.
    """

    rank: int = 0
    count: int = 1
    """The world size."""
    sharding: Sharding | None = None
    """How weights are split (FSDP); None for a replica in every process."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files and talks to people."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of every weight."""
        return self.sharding is not None

    # Rows of a batch

    def share(self, rows: int, *, group: int = 1) -> range:
        """This process's part of so many rows, in whole groups of `group` rows.

        Parts are consecutive and differ by one group at most.
        """
        size, longer = divmod(rows // group, self.count)
        start = self.rank * size + min(self.rank, longer)
        return range(group * start, group * (start + size + (self.rank < longer)))

    def largest_share(self, rows: int, *, group: int = 1) -> int:
        """How many of so many rows the process with the most of them has."""
        return group * -(-(rows // group) // self.count)

    def all_gather_rows(self, own: Tensor, rows: range, shape: Sequence[int]) -> Tensor:
        """All-gather: [N, B, T] of all processes' rows, `own` [N, b, t] being `rows` of this one, and `shape` (B, T).

        The result is 0 beyond each process's t, and has no gradient.
        """
        if self.count == 1:
            return own
        gathered = own.new_zeros(own.shape[0], *shape)
        gathered[:, rows.start : rows.stop, : own.shape[2]] = own
        # Every row is one process's and zero in the others, so an all-reduce of the sum is an exact all-gather.
        dist.all_reduce(gathered)
        return gathered

    # Work whose errors all processes raise

    def on_all(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """All-gather of objects (`all_gather_object`): what `work` returned in each process, by rank.

        Results are pickled: tensors must be on the CPU. If `work` failed in one process, all of them raise its error.
        """
        if self.count == 1:
            return [work(*args, **kwargs)]
        outcome: T | _Failed
        try:
            outcome = work(*args, **kwargs)
        except Exception as error:
            outcome = _Failed.of(error)
        outcomes: list[Any] = [None] * self.count
        dist.all_gather_object(outcomes, outcome)
        for rank, other in enumerate(outcomes):
            if isinstance(other, _Failed):
                failure = outcome.error if rank == self.rank and isinstance(outcome, _Failed) else other.error
                failure.add_note(f"in process {rank} of {self.count}")
                raise failure
        return outcomes

    def on_main(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Broadcast of an object: only rank 0 does the work; all get its result, or raise its error."""
        own: Callable[[], Any] = functools.partial(work, *args, **kwargs) if self.is_main else _no_work
        result: T = self.on_all(own)[0]
        return result

    # Weights and gradients

    def broadcast(self, parameters: Iterable[nn.Parameter]) -> None:
        """Broadcast: gives every process rank 0's parameters, in place."""
        if self.count == 1:
            return
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """All-reduce: adds up each parameter's gradient over the processes, in place.

        Gradients of sharded parameters are left alone: FSDP's backward pass has already reduce-scattered their sum.
        """
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def shard(self, policy: Policy) -> None:
        """Splits the weights of the policy and its reference over the processes, in place, if the run is sharded.

        Every process must hold the same weights. Build the optimizer afterwards: the parameters are other objects.

        Raises:
            ConfigError: the policy has no modules of the classes that `sharding.blocks` names.
        """
        if self.sharding is not None:
            fsdp.shard(policy, self.sharding)

    def gathered_weights(self, policy: Policy) -> AbstractContextManager[None]:
        """All-gather of sharded weights, for the length of the block: each process then generates at its own pace."""
        return nullcontext() if self.sharding is None else fsdp.gathered_weights(policy, self.sharding)

    def weights_line(self, policy: Policy) -> str:
        """How much of the sharded weights this process holds, for people; empty if each has a replica."""
        return "" if self.sharding is None else fsdp.memory_line(policy)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """All-gather of a sharded tensor, on its device; any other tensor as it is."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def full_tensor_on_main(self, tensor: Tensor) -> Tensor:
        """Gather of a sharded tensor to rank 0's CPU, as files hold it; the other ranks get an empty tensor.

        Any other tensor is returned as it is.
        """
        if not isinstance(tensor, DTensor):
            return tensor
        everything = tensor.full_tensor()
        return everything.cpu() if self.is_main else everything.new_empty(0)

    def own_shard(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a full tensor that all of them hold, split as `like` is. Nothing is sent.

        If `like` is not sharded, the tensor as it is.
        """
        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def full_weights_on_main(self, policy: Policy) -> PolicyWeights | None:
        """Gather of the weights that `save_policy` writes to rank 0's CPU; None if each process has a replica."""
        if self.sharding is None:
            return None

        def of(module: nn.Module, *, learning: bool = False) -> dict[str, Tensor]:
            held = module.state_dict(keep_vars=True)
            # Tied weights stay one tensor, which is written once.
            once = {
                id(t): self.full_tensor_on_main(t.detach()) for t in held.values() if t.requires_grad or not learning
            }
            return {name: once[id(tensor)] for name, tensor in held.items() if id(tensor) in once}

        return PolicyWeights(
            # Of a model with adapters, its base is not written.
            model=of(policy.model, learning=policy.has_adapters),
            value_head={} if policy.v_head is None else of(policy.v_head),
            value_model={}
            if policy.value_model is None
            else of(policy.value_model, learning=isinstance(policy.value_model, peft.PeftModel)),
        )


def _no_work() -> None:
    return None


@dataclass(frozen=True)
class _Failed:
    """An error on its way to the other processes."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> "_Failed":
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # Some errors can't be built again from their arguments; their text can.
            return cls(RuntimeError(f"{type(error).__name__}: {error}"))
        return cls(error)
