"""A mini-batch's whole update as one CUDA graph: forward, losses, backward, clipping, Adam, statistics.

For a small model Python launches kernels more slowly than a GPU runs them. A recorded update is launched once, and
reads nothing back: whether the weights may move is decided on the device (`found_inf`, as for loss scaling), and the
statistics of all mini-batches are read together. Shapes are rounded up, so that few graphs come up; the tokens added
are padding, and see only themselves.

Failure modes: a graph that goes on with old addresses (weights are changed in place only; gradients have their own
tensors here), or a warm-up that moves a weight (`hold` forbids it).
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plaudit.policy.packing import ModelInput, packed
from plaudit.policy.samples import Samples

TOKENS = 128
"""Response tokens are rounded up to a multiple of this."""
WARM_UPS = 2


@dataclass(frozen=True)
class FlatMinibatch:
    """Some rows of a rollout as their N response tokens one after another. All but the model's input is [N]."""

    given: ModelInput
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, samples: Samples, **columns: Tensor) -> "FlatMinibatch":
        """`columns` are [b, T] of the same samples. Padding is added up to a rounded number of tokens."""
        given = packed(samples, own_mask=True, rounded=True)
        count = len(given.states)
        missing = -count % TOKENS

        def flat(tensor: Tensor) -> Tensor:
            return functional.pad(samples.gather(tensor), (0, missing))

        return cls(
            given=dataclasses.replace(given, states=functional.pad(given.states, (0, missing))),
            tokens=flat(samples.response_ids),
            mask=flat(samples.mask),
            **{name: flat(tensor) for name, tensor in columns.items()},
        )

    def tensors(self) -> Mapping[str, Tensor]:
        """All of them by name."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "given"}
        return {**own, **self.given.arguments, "states": self.given.states}

    def copy_(self, other: "FlatMinibatch") -> None:
        """Takes another one's contents, of the same shapes, in place."""
        for name, tensor in other.tensors().items():
            self.tensors()[name].copy_(tensor)

    def clone(self) -> "FlatMinibatch":
        """A copy with tensors of its own."""
        arguments = {name: tensor.clone() for name, tensor in self.given.arguments.items()}
        own = {f.name: getattr(self, f.name).clone() for f in dataclasses.fields(self) if f.name != "given"}
        return FlatMinibatch(given=ModelInput(arguments, self.given.states.clone()), **own)


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    given: FlatMinibatch
    statistics: Tensor


class UpdateGraphs:
    """Recorded updates, one for each shape. `learn` computes one and moves the weights, unless `hold` is above 0."""

    def __init__(self, parameters: list[nn.Parameter], learn: Callable[[FlatMinibatch, Tensor], Tensor]) -> None:
        self._parameters = parameters
        self._learn = learn
        self._gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self._hold = torch.zeros((), device=parameters[0].device)
        self._recorded: dict[tuple[torch.Size, int], _Recorded] = {}
        self._pool: Any = None

    def update(self, minibatch: FlatMinibatch) -> Tensor | None:
        """Moves the weights once; the statistics, on the device. None where this update can't be recorded."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        if not minibatch.mask.is_cuda:
            return self._compute(minibatch)
        shape = minibatch.given.arguments["input_ids"].shape, len(minibatch.mask)
        recorded = self._recorded.get(shape)
        if recorded is None:
            try:
                recorded = self._recorded[shape] = self._record(minibatch)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                warnings.warn(
                    f"updates are not recorded as CUDA graphs, and slower for it: {reason:.200}", stacklevel=2
                )
                return None
        recorded.given.copy_(minibatch)
        recorded.graph.replay()
        return recorded.statistics.clone()

    def _compute(self, minibatch: FlatMinibatch) -> Tensor:
        torch._foreach_zero_(self._gradients)
        return self._learn(minibatch, self._hold)

    def _record(self, minibatch: FlatMinibatch) -> _Recorded:
        own = minibatch.clone()
        self._hold.fill_(1.0)
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._compute(own)
            torch.cuda.current_stream().wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                statistics = self._compute(own)
        finally:
            self._hold.zero_()
        return _Recorded(graph, own, statistics)
