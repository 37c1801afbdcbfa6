"""The real program under load: stopped, reloaded, poisoned. Nothing is lost, and every reward is the right one."""

import asyncio
from pathlib import Path

from harness.load.rewards import drain, poison, reload


def test_a_drain_under_load_answers_all_that_was_accepted_and_refuses_the_rest(classifier_dir: Path) -> None:
    tally = asyncio.run(drain(classifier_dir, callers=16, answers=50))
    assert tally.complete, tally
    assert tally.answered >= 50
    assert tally.refused.total() >= 16, "each caller ends with a refusal"


def test_every_answer_during_reloads_is_that_of_the_revision_it_names(classifier_dir: Path) -> None:
    tally, happened = asyncio.run(reload(classifier_dir, callers=8, answers=10, enough=lambda turn: turn == 6))
    assert tally.complete, tally
    assert happened == {"request reloads": 2, "signal reloads": 2, "request broken": 1, "signal broken": 1}
    assert len(tally.by_revision) == 2
    assert tally.answered == tally.sent


def test_poisonous_texts_fail_alone_under_load(classifier_dir: Path) -> None:
    tally = asyncio.run(poison(classifier_dir, callers=16, enough=lambda tally: tally.failed >= 10))
    assert tally.complete, tally
    assert tally.failed >= 10
    assert tally.answered + tally.failed == tally.sent
