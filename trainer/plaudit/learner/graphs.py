"""A mini-batch's whole update, or the evaluation of a rollout, as one CUDA graph.

For a small model Python launches kernels more slowly than a GPU runs them. A recorded update (forward, losses,
backward, clipping, Adam, statistics) is launched once and reads nothing back. Whether weights may move is decided on
the device (`found_inf`, as for loss scaling), and the statistics of all mini-batches are read together. Shapes are
rounded up, so that few graphs are recorded; the tokens added are padding, and attend to themselves alone.

Failure modes: a graph that goes on with old addresses (weights are changed in place only; gradients have their own
tensors here), or a warm-up that moves a weight (`hold` forbids it).
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from plaudit.policy.packing import ModelInput, packed
from plaudit.policy.samples import Samples

TOKENS = 128
"""Response tokens are rounded up to a multiple of this."""
WARM_UPS = 2


@dataclass(frozen=True)
class FlatSamples:
    """Samples as their N response tokens one after another, with the model's input. Padded to a rounded shape."""

    given: ModelInput
    tokens: Tensor
    """[N]"""
    mask: Tensor
    """[N] bool, True on real tokens."""

    @classmethod
    def of(cls, samples: Samples, mask_dtype: torch.dtype | None, **columns: Tensor) -> Self:
        """`mask_dtype` is `Policy.mask_dtype`; `columns` are [b, T], for the further fields of a subclass."""
        given = packed(samples, mask_dtype=mask_dtype, rounded=True)
        missing = -len(given.states) % TOKENS

        def flat(tensor: Tensor) -> Tensor:
            return functional.pad(samples.gather(tensor), (0, missing))

        return cls(
            given=dataclasses.replace(given, states=functional.pad(given.states, (0, missing))),
            tokens=flat(samples.response_ids),
            mask=flat(samples.mask),
            **{name: flat(tensor) for name, tensor in columns.items()},
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The rounded shape, which decides which graph is replayed."""
        return (*self.given.arguments["input_ids"].shape, len(self.mask))

    def tensors(self) -> Mapping[str, Tensor]:
        """All of its tensors by name."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "given"}
        return {**own, **self.given.arguments, "states": self.given.states}

    def copy_(self, other: Self) -> None:
        """Copies the contents of another one of the same shapes, in place."""
        own = self.tensors()
        for name, tensor in other.tensors().items():
            own[name].copy_(tensor)

    def clone(self) -> Self:
        """A copy with tensors of its own."""
        arguments = {name: tensor.clone() for name, tensor in self.given.arguments.items()}
        own = {f.name: getattr(self, f.name).clone() for f in dataclasses.fields(self) if f.name != "given"}
        return type(self)(given=ModelInput(arguments, self.given.states.clone()), **own)


@dataclass(frozen=True)
class FlatMinibatch(FlatSamples):
    """Some rows of a rollout, token by token. All further fields are [N] as well."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


Batch = TypeVar("Batch", bound=FlatSamples)


class Graphs(Generic[Batch]):
    """One piece of work on the GPU, recorded once for each shape of its batch, and replayed from then on."""

    def __init__(self, work: Callable[[Batch], Tensor]) -> None:
        self._work = work
        self._recorded: dict[tuple[int, ...], tuple[Any, Batch, Tensor]] = {}
        self._pool: Any = None

    def run(self, batch: Batch) -> Tensor:
        """The result of the work on `batch`; on a CPU it runs unrecorded.

        Raises:
            RuntimeError: the work can't be recorded.
        """
        if not batch.mask.is_cuda:
            return self._work(batch)
        if batch.shape not in self._recorded:
            self._recorded[batch.shape] = self._record(batch.clone())
        graph, given, result = self._recorded[batch.shape]
        given.copy_(batch)
        graph.replay()
        return result.clone()

    def _record(self, own: Batch) -> tuple[Any, Batch, Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._work(own)
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._work(own)
        return graph, own, result


class UpdateGraphs(Graphs[FlatMinibatch]):
    """Recorded updates. `learn` starts from zero gradients and moves the weights, unless its `hold` is above 0."""

    def __init__(self, parameters: list[nn.Parameter], learn: Callable[[FlatMinibatch, Tensor], Tensor]) -> None:
        super().__init__(self._from_zero)
        self._parameters = parameters
        self._learn = learn
        self._gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self._hold = torch.zeros((), device=parameters[0].device)

    def run(self, batch: FlatMinibatch) -> Tensor:
        """Moves the weights once; returns the statistics, which stay on the device."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return super().run(batch)

    def _from_zero(self, batch: FlatMinibatch) -> Tensor:
        zero_(self._gradients)
        return self._learn(batch, self._hold)

    def _record(self, own: FlatMinibatch) -> tuple[Any, FlatMinibatch, Tensor]:
        self._hold.fill_(1.0)
        try:
            return super()._record(own)
        finally:
            self._hold.zero_()


def zero_(tensors: list[Tensor]) -> None:
    """Sets all tensors to 0: by one kernel where torch has that (it is not documented), else by one for each."""
    at_once = getattr(torch, "_foreach_zero_", None)
    if at_once is None:
        for tensor in tensors:
            tensor.zero_()
    else:
        at_once(tensors)


def warn_of_no_graphs(what: str, error: RuntimeError) -> None:
    """Warns that `what` are computed without CUDA graphs, and why."""
    reason = " ".join(str(error).split())
    warnings.warn(f"{what} are not recorded as CUDA graphs, and slower for it: {reason:.200}", stacklevel=2)
