import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.ppo.aggregation import Aggregation, aggregate, divisor, group_sum

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [8.0, 50.0, 50.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
KINDS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "sequence_sum")


def test_each_aggregation_by_hand() -> None:
    assert aggregate(LOSSES, MASK, aggregation="token_mean").item() == (1 + 2 + 3 + 8) / 4
    assert aggregate(LOSSES, MASK, aggregation="sequence_mean").item() == ((1 + 2 + 3) / 3 + 8) / 2
    assert aggregate(LOSSES, MASK, aggregation="sequence_sum", tokens=8).item() == (6 / 8 + 8 / 8) / 2


def test_the_weight_of_a_token_is_what_each_aggregation_says() -> None:
    def weights(aggregation: Aggregation, tokens: float | None = None) -> list[list[float]]:
        losses = LOSSES.clone().requires_grad_()
        aggregate(losses, MASK, aggregation=aggregation, tokens=tokens).backward()
        assert losses.grad is not None
        return losses.grad.tolist()

    assert weights("token_mean") == [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
    # A long response's tokens count less than a short one's; with a constant, all count the same.
    torch.testing.assert_close(torch.tensor(weights("sequence_mean")), torch.tensor([[1 / 6] * 3, [0.5, 0.0, 0.0]]))
    assert weights("sequence_sum", 4) == [[0.125, 0.125, 0.125], [0.125, 0.0, 0.0]]


@pytest.mark.parametrize("aggregation", KINDS)
def test_responses_of_one_length_aggregate_alike_if_the_constant_is_that_length(aggregation: Aggregation) -> None:
    losses = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(losses, dtype=torch.bool)
    torch.testing.assert_close(aggregate(losses, mask, aggregation=aggregation, tokens=5), losses.mean())


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(0, 2**16))
def test_the_parts_of_groups_add_up_to_the_whole(aggregation: Aggregation, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.randint(1, 5, (5, 1), generator=generator)
    whole = divisor(mask, aggregation=aggregation)
    parts = [
        group_sum(some, real, aggregation=aggregation, tokens=7) / whole
        for some, real in zip(losses.split(size), mask.split(size), strict=True)
    ]
    torch.testing.assert_close(sum(parts), aggregate(losses, mask, aggregation=aggregation, tokens=7))


def test_a_sum_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="sequence_sum needs the number of tokens"):
        aggregate(LOSSES, MASK, aggregation="sequence_sum")
