"""What recorded updates lean on in torch beyond its documentation: tried, and done without where it doesn't work."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from plaudit.learner import adam
from plaudit.learner.graphs import zero_

WRITTEN_FOR = ((2, 9), (2, 13))
"""The oldest torch that pyproject.toml allows, and the newest whose fused Adam and `_foreach_zero_` were read."""


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    adam.skips_on_found_inf.cache_clear()
    yield
    adam.skips_on_found_inf.cache_clear()


def test_this_version_of_torch_is_one_that_was_looked_at_and_has_the_fast_ways() -> None:
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    oldest, newest = WRITTEN_FOR
    assert oldest <= version <= newest, "read how fused Adam treats found_inf in this version, then name it above"
    assert adam.skips_on_found_inf("cpu")
    assert callable(torch._foreach_zero_)


class Deaf(torch.optim.Adam):
    """A later version that no longer looks at `found_inf`."""

    found_inf: Any

    def step(self, closure: Any = None) -> Any:
        del self.found_inf
        try:
            return super().step(closure)
        finally:
            self.found_inf = None


class Strict(torch.optim.Adam):
    """A later version that has no room for further attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "found_inf":
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("later", [Deaf, Strict])
def test_an_adam_that_does_not_heed_found_inf_is_found_out(
    later: type[torch.optim.Adam], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "Adam", later)
    assert not adam.skips_on_found_inf("cpu")


def test_without_foreach_zero_every_tensor_is_zeroed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_foreach_zero_")
    tensors = [torch.ones(3), torch.ones(2, 2)]
    zero_(tensors)
    assert not any(tensor.any() for tensor in tensors)
