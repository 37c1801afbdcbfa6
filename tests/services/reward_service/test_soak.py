"""The small form of benchmarks/service/soak.py: seconds instead of minutes, and no training run."""

import pytest

from harness.load.siege import ATTACKS, besiege, besieged_service, known_texts

pytestmark = pytest.mark.slow


def test_clients_that_behave_get_their_rewards_while_everything_is_attacked() -> None:
    with besieged_service() as service:
        outcome = besiege(service, 8.0, known_texts(service.port))
    assert outcome.compared > 0, outcome.said()
    assert outcome.wrong == 0, outcome.said()
    assert not outcome.refused, outcome.said()
    assert outcome.attacks.keys() == set(ATTACKS), outcome.said()
    assert outcome.end_mb < outcome.start_mb + 300, outcome.said()
