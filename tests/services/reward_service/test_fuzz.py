"""A small, fixed share of what benchmarks/service/fuzz.py sends."""

from collections.abc import Iterator

import pytest

from harness.load.fuzz import PARTS, counted_by_the_service, known_rewards
from harness.load.hostile_requests import FUZZ_KEY
from harness.reward_service import RewardService
from harness.tiny_models import tiny_classifier_dir


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, RewardService]]:
    """Without and with a key."""
    model = tiny_classifier_dir(tmp_path_factory.mktemp("fuzzed"))
    flags = ("--label", "POSITIVE")
    with RewardService(model, *flags) as without, RewardService(model, *flags, api_key=FUZZ_KEY) as keyed:
        yield {False: without, True: keyed}


@pytest.mark.parametrize("name", PARTS)
def test_what_nobody_would_send_gets_the_answer_that_is_documented(
    services: dict[bool, RewardService], name: str
) -> None:
    part = PARTS[name]
    service = services[part.keyed]
    before = known_rewards(service.url)
    tally = part.send(service.url, 200, 0)
    assert tally.sent >= 200
    assert not tally.wrong, tally
    assert tally.server_errors == 0
    assert {status for status in counted_by_the_service(service.url) if status >= "500"} <= {"501"}
    assert known_rewards(service.url) == before
