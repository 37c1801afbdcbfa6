"""A small, fixed share of what benchmarks/service/fuzz.py sends."""

from collections.abc import Iterator

import pytest

from harness.load.fuzz import PARTS
from harness.reward_service import RewardService
from harness.tiny_models import tiny_classifier_dir


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardService]:
    with RewardService(tiny_classifier_dir(tmp_path_factory.mktemp("fuzzed")), "--label", "POSITIVE") as running:
        yield running


@pytest.mark.parametrize("part", PARTS)
def test_what_nobody_would_send_gets_the_answer_that_is_documented(service: RewardService, part: str) -> None:
    tally = PARTS[part][0](service.url, 200, 0)
    assert tally.sent >= 200
    assert not tally.wrong, tally
    assert tally.server_errors == 0
