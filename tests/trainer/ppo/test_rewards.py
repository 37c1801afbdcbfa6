import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.ppo import rewards
from plaudit.ppo.rewards import RunningMoments

MASK = torch.tensor([[True, True, True], [True, False, False]])
KLS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 9.0, 9.0]])


def test_each_token_pays_for_its_kl_and_the_last_real_one_earns_the_score() -> None:
    total, non_score = rewards.token_rewards(torch.tensor([3.0, -2.0]), KLS, MASK, kl_coef=0.2)
    assert torch.allclose(non_score, torch.tensor([[-0.1, 0.2, -0.4], [-0.2, 0.0, 0.0]]))
    assert torch.allclose(total, torch.tensor([[-0.1, 0.2, 2.6], [-2.2, 0.0, 0.0]]))


def test_the_score_is_earned_once_whatever_the_length() -> None:
    scores = torch.tensor([3.0, -2.0])
    total, non_score = rewards.token_rewards(scores, KLS, MASK, kl_coef=0.2)
    assert torch.allclose((total - non_score).sum(1), scores)


def test_a_row_without_a_token_has_nowhere_to_put_its_score() -> None:
    with pytest.raises(ValueError, match="nowhere to put its score"):
        rewards.token_rewards(torch.tensor([3.0]), KLS[:1], torch.zeros(1, 3, dtype=torch.bool), kl_coef=0.2)


# Defect 1: score scaling crashed, since the running standard deviation was a float without `.to`.
def test_scaling_divides_by_the_standard_deviation_of_all_scores_so_far() -> None:
    moments = RunningMoments().update(torch.tensor([1.0, 2.0])).update(torch.tensor([6.0]))
    assert (moments.count, moments.mean) == (3.0, 3.0)
    assert moments.std == pytest.approx(7**0.5)
    assert rewards.scale_scores(torch.tensor([7.0]), moments).item() == pytest.approx(7**0.5, rel=1e-6)
    assert rewards.normalise_scores(torch.tensor([3.0]), moments).item() == 0.0


def test_one_score_cannot_be_scaled_and_stays_as_it_is() -> None:
    moments = RunningMoments().update(torch.tensor([4.0]))
    assert rewards.scale_scores(torch.tensor([4.0]), moments).item() == pytest.approx(4.0)


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=8), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores_however_they_were_batched(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments = moments.update(torch.tensor(batch, dtype=torch.float64))
    everything = [score for batch in batches for score in batch]
    assert moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
    if len(everything) > 1:
        assert moments.std == pytest.approx(statistics.stdev(everything), abs=1e-6)


def test_a_response_that_did_not_end_pays_and_one_that_did_does_not() -> None:
    scores = rewards.penalise_missing_eos(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5)
    assert scores.tolist() == [1.0, 0.5]


def test_length_costs_nothing_up_to_the_free_tokens() -> None:
    scores = rewards.penalise_length(torch.zeros(3), torch.tensor([5, 10, 12]), free_tokens=10, penalty_per_token=0.25)
    assert scores.tolist() == [0.0, 0.0, -0.5]
