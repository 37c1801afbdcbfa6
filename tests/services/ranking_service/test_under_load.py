"""The small form of benchmarks/ranking/kills.py: nothing is lost when the service is killed under load."""

from collections.abc import Iterator

import pytest

from harness.load.rankings import storm
from harness.ranking_service import RankingService


@pytest.fixture
def running(database_url: str) -> Iterator[RankingService]:
    service = RankingService(database_url)
    yield service
    service.kill()


def test_people_who_rank_at_once_lose_nothing_to_kills(running: RankingService) -> None:
    account = storm(running, people=8, tasks=40, kills=2)
    assert account.faults == (0, 0, 0, 0, 0)
    assert account.rankings == 60
    assert account.kills == 2
    assert account.doubled > 0
