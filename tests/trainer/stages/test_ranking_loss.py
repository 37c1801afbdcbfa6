"""The loss of ranked answers: by hand, and equal to the loss of pairs where it is one."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from plaudit.stages.ranked_answers import EXAMPLES, Collator
from plaudit.stages.ranking_loss import ranking_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_prompts_with_three_and_two_answers_by_hand() -> None:
    # Prompt 1: answers 0 to 2, (0, 1) won by two thirds and (0, 2) won. Prompt 2: answers 3 and 4, won once each.
    scores = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0])
    loss = ranking_loss(
        scores,
        torch.tensor([0, 0, 3]),
        torch.tensor([1, 2, 4]),
        torch.tensor([2 / 3, 1.0, 0.5]),
        margin=torch.tensor([0.0, 1.0, 0.0]),
        weight=torch.tensor([0.5, 0.5, 1.0]),
        prompts=2,
        centring=0.1,
    )
    first = -(2 / 3 * math.log(sigmoid(0.5)) + 1 / 3 * math.log(sigmoid(-0.5))) + 0.1 * 1.5**2
    second = -math.log(sigmoid(2.0 - 1.0)) + 0.1 * 0.0**2
    third = -(math.log(sigmoid(2.0)) + math.log(sigmoid(-2.0))) / 2 + 0.1 * 2.0**2
    assert loss.item() == pytest.approx(((first + second) / 2 + third) / 2, rel=1e-6)


def test_with_two_answers_and_hard_targets_it_is_the_loss_of_pairs_as_trl_has_it() -> None:
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 6)
    loss = ranking_loss(
        torch.stack([chosen, rejected], dim=1).flatten(),
        torch.arange(0, 12, 2),
        torch.arange(1, 12, 2),
        torch.ones(6),
        margin=margin,
        weight=torch.ones(6),
        prompts=6,
        centring=0.01,
    )
    expected = -logsigmoid(chosen - rejected - margin).mean() + 0.01 * torch.mean((chosen + rejected) ** 2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_soft_target_is_least_where_the_scores_say_the_same() -> None:
    difference = torch.tensor(math.log(0.8 / 0.2), requires_grad=True)
    loss = ranking_loss(
        torch.stack([difference, torch.zeros(())]),
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([0.8]),
        margin=torch.zeros(1),
        weight=torch.ones(1),
        prompts=1,
    )
    (gradient,) = torch.autograd.grad(loss, difference)
    assert gradient.item() == pytest.approx(0.0, abs=1e-6)


def test_which_of_two_answers_is_first_makes_no_difference() -> None:
    scores, one, other = torch.tensor([0.3, -1.2]), torch.tensor([0]), torch.tensor([1])

    def loss(first: torch.Tensor, second: torch.Tensor, target: float, margin: float) -> float:
        towards, by = torch.tensor([target]), torch.tensor([margin])
        return ranking_loss(scores, first, second, towards, margin=by, weight=torch.ones(1), prompts=1).item()

    assert loss(one, other, 0.7, 0.5) == pytest.approx(loss(other, one, 0.3, -0.5))


def test_the_parts_of_a_batch_are_the_batches_of_their_prompts(tokenizer: Any) -> None:
    def element(answers: int, pairs: list[tuple[int, int]]) -> dict[str, list[Any]]:
        sides: dict[str, list[Any]] = {"first": [i for i, _ in pairs], "second": [j for _, j in pairs]}
        values: dict[str, list[Any]] = {"target": [1.0] * len(pairs), "margin": [0.0] * len(pairs)}
        return {"ids": [[5 + answers, 6, 7]] * answers, **sides, **values}

    elements = [element(3, [(0, 1), (0, 2), (1, 2)]), element(2, [(0, 1)]), element(4, [(0, 3), (2, 1)])]
    collate = Collator(tokenizer)
    batch = collate(elements)
    assert EXAMPLES.size(batch) == 3
    assert batch["first"].tolist() == [0, 0, 1, 3, 5, 7]
    for start, stop in ((0, 1), (1, 3), (2, 3)):
        part, expected = EXAMPLES.part(batch, start, stop), collate(elements[start:stop])
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], expected[name]) for name in expected)
