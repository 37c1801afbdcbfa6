"""Several processes, one run: each takes a share of every batch, and computes the same numbers.

What would be wrong here: an average of averages where one process has one average, so rows are put together before
anything is computed from them; or a process that waits for one that has failed, so whoever fails says so to the others.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plaudit.errors import ConfigError, PlauditError

T = TypeVar("T")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are."""


class ProcessLost(PlauditError, RuntimeError):
    """Another process of the run has died, or did not answer within the timeout."""


@dataclass(frozen=True)
class Processes:
    """This process among all that make one run. Alone, everything here does nothing."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """This process's part of so many rows; parts are consecutive and differ by one row at most."""
        size, longer = divmod(rows, self.count)
        start = self.rank * size + min(self.rank, longer)
        return range(start, start + size + (self.rank < longer))

    def largest_share(self, rows: int) -> int:
        """How many of so many rows the process with the most of them has."""
        return -(-rows // self.count)

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gave in each process, in their order. If it failed in one, all of them raise that one's error.

        Results are pickled: tensors must be on the CPU.
        """
        if self.count == 1:
            return [work()]
        outcome: T | _Failed
        try:
            outcome = work()
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

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gave in the main process, the only one that does it; its error in all of them if it failed."""
        result: Any = self.together(lambda: work() if self.is_main else None)[0]
        return result  # type: ignore[no-any-return]

    def complete(self, own: Tensor, rows: range, shape: Sequence[int]) -> Tensor:
        """[N, B, T] of all processes' rows, `own` [N, b, t] being `rows` of this one. 0 beyond t, and no gradient."""
        if self.count == 1:
            return own
        whole = own.new_zeros(own.shape[0], *shape)
        whole[:, rows.start : rows.stop, : own.shape[2]] = own
        # Every row is somebody's and zero elsewhere, so the sum is exact.
        dist.all_reduce(whole)
        return whole

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up each parameter's gradient over the processes, in place. Those of sharded ones are sums already."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def copy_from_main(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives every process the main one's parameters."""
        if self.count == 1:
            return
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def device_named(name: str | None) -> torch.device:
    """The device of this name; without one, the GPU if there is one. Raises `ConfigError` if it isn't there."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if there else "cpu"))
        if device.type != "cuda":
            torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"device={name!r} can't be used here ({' '.join(str(error).split()):.120})") from error
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(
            f"device={name!r}: torch {torch.__version__} finds {there} GPUs here; pass --device cpu, or leave it out"
        )
    return device


def settle_arithmetic(*, tf32: bool = False) -> None:
    """How GPUs of this process compute: matrix products in TF32 if asked for, and attention without cuDNN.

    cuDNN's attention, torch's first choice on recent GPUs, is not deterministic, and makes a plan for each new shape.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def joined(device: str | None, *, timeout_s: float) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that `accelerate launch` or `torchrun` started, and this one's device; else this one alone.

    `device` None is the GPU if there is one. Nothing waits longer than `timeout_s` for another process. Raises
    `ProcessLost` when one doesn't answer.
    """
    chosen = device_named(device)
    if max(int(os.environ.get(name, "1")) for name in WORLD_SIZES) == 1:
        yield Processes(), chosen
        return
    from accelerate import PartialState

    state = PartialState(cpu=chosen.type == "cpu", timeout=timedelta(seconds=timeout_s))
    with _naming_lost_processes():
        yield Processes(state.process_index, state.num_processes), state.device
    # Not after an error: one that has died would be waited for.
    state.destroy_process_group()


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


@contextmanager
def _naming_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo has no error of its own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ProcessLost(
            f"another process of this run has ended or does not answer ({reason:.120}); see its message, and go on "
            "with the same command and --resume auto"
        ) from error
