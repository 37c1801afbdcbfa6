"""The soak of `benchmarks/soak.py`, for seconds instead of minutes."""

from pathlib import Path

from benchmarks.soak import ATTACKS, service, soak


def test_clients_that_behave_get_their_rewards_while_everything_is_attacked(tmp_path: Path) -> None:
    with service(tmp_path) as (port, process):
        outcome = soak(port, process, 8.0, 0, tmp_path)
    assert outcome.compared > 0, outcome.said()
    assert outcome.wrong == 0, outcome.said()
    assert not outcome.refused, outcome.said()
    assert outcome.attacks.keys() == set(ATTACKS), outcome.said()
    assert outcome.end_mb < outcome.start_mb + 300, outcome.said()
