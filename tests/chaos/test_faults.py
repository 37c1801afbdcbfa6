"""`plaudit ppo` as a process, against servers that fail in every way: it ends as documented, and its rewards are right.

A run that stops is resumed; in the end the weights are those of the undisturbed run, to the bit.
"""

from collections.abc import Iterator

import pytest

from harness import chaos
from harness.chaos import CABLES, FAULTS, KILLS, REAL_KILLS, Account, Fault, Replicas, Trial
from harness.machine.network import why_not

pytestmark = pytest.mark.slow

WHY_NOT = why_not()
needs_namespaces = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    with chaos.stubs(1) as (server,):
        trial = Trial(tmp_path_factory.mktemp("chaos"), server.url)
    assert len(trial.samples) == chaos.STEPS * 8
    assert [reward for _, _, reward in trial.samples] == [chaos.reward_of(p, r) for p, r, _ in trial.samples]
    return trial


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    replicas = Replicas(tmp_path_factory.mktemp("replicas"))
    yield replicas
    replicas.kill()


def assert_right(account: Account, exit_code: int) -> None:
    assert account.exit_codes == ([exit_code, 0] if exit_code else [0])
    assert (account.lost, account.invented, account.same_weights) == (0, 0, True)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.exit_code != 65], ids=lambda fault: fault.name)
def test_a_fault_that_passes_or_lasts_changes_no_weight(trial: Trial, fault: Fault) -> None:
    assert_right(chaos.with_fault(trial, fault), fault.exit_code)


@pytest.mark.timeout(900)  # it is a run for each of them
def test_no_answer_that_is_refused_changes_a_weight(trial: Trial) -> None:
    refused = [fault for fault in FAULTS if fault.exit_code == 65]
    account = chaos.with_one_fault_after_the_other(trial, refused)
    assert account.exit_codes == [65] * len(refused) + [0]
    assert (account.lost, account.invented, account.same_weights) == (0, 0, True)


@pytest.mark.parametrize("name", KILLS)
def test_a_server_that_is_killed_changes_no_weight(trial: Trial, name: str) -> None:
    exit_code, play = KILLS[name]
    assert_right(play(trial), exit_code)


@pytest.mark.timeout(900)  # it imports torch four times, and the machine may be busy
@pytest.mark.parametrize("name", REAL_KILLS)
def test_the_real_service_killed_changes_no_weight(replicas: Replicas, name: str) -> None:
    exit_code, play = REAL_KILLS[name]
    replicas.restart()
    assert_right(play(replicas), exit_code)


@needs_namespaces
@pytest.mark.parametrize("name", CABLES)
def test_a_bad_network_changes_no_weight(trial: Trial, name: str) -> None:
    exit_code, play = CABLES[name]
    assert_right(play(trial), exit_code)
