"""The simulation against times worked by hand, laws of queueing theory, and conservation of requests."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from plaudit.sizing.autoscaling import Autoscaler, Signal
from plaudit.sizing.fleet import Fleet, FleetSettings, mean_size, simulate
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import Workload

ONE_REQUEST = Workload(
    generate_s=1.0, evaluate_s=0.0, update_s=3.0, texts_per_step=32, chunk_texts=32, tokens_per_text=30, spread=0.0
)
FIXED = ServiceTimes.linear(0.1, 0.0)
"""Every batch takes a tenth of a second."""


def with_work(**changes: float) -> Workload:
    return dataclasses.replace(ONE_REQUEST, **changes)  # type: ignore[arg-type]


def test_one_request_alone_waits_for_its_batch() -> None:
    found = simulate(FleetSettings(ONE_REQUEST, FIXED, batch_tokens=2000))
    assert found.wait_s == pytest.approx(0.1)
    assert found.wait_share == pytest.approx(0.1 / 4.1, rel=0.05)
    assert found.latency_p99_s == pytest.approx(0.1)


def test_two_requests_of_a_burst_share_a_batch_only_if_it_is_large_enough() -> None:
    burst = with_work(texts_per_step=64, chunk_texts=64)
    # The first request runs alone, because the engine is idle when it comes. The second runs after it.
    assert simulate(FleetSettings(burst, FIXED, batch_tokens=4000)).wait_s == pytest.approx(0.2)
    # Of four, three come while the first runs: together they are the second batch, or the second to fourth.
    burst = with_work(texts_per_step=128, chunk_texts=128)
    assert simulate(FleetSettings(burst, FIXED, batch_tokens=4000)).wait_s == pytest.approx(0.2)
    whole_requests = dataclasses.replace(burst, tokens_per_text=1.0)  # every text has the least number of tokens, 4
    assert simulate(FleetSettings(whole_requests, FIXED, batch_tokens=128)).wait_s == pytest.approx(0.4)


@pytest.mark.parametrize(("evaluate_s", "wait_s"), [(0.04, 0.06), (0.1, 0.0), (5.0, 0.0)])
def test_work_beside_the_scoring_hides_it(evaluate_s: float, wait_s: float) -> None:
    found = simulate(FleetSettings(with_work(evaluate_s=evaluate_s), FIXED, batch_tokens=2000))
    assert found.wait_s == pytest.approx(wait_s, abs=1e-9)


def test_front_end_and_network_add_to_the_wait() -> None:
    times = dataclasses.replace(FIXED, front_s=0.01, front_text_s=0.001, delay_s=0.02, client_s=0.004)
    found = simulate(FleetSettings(ONE_REQUEST, times, batch_tokens=2000))
    assert found.wait_s == pytest.approx(0.1 + 0.01 + 32 * 0.001 + 0.02 + 0.004)


def test_on_one_core_a_request_takes_its_time_from_the_forward_pass() -> None:
    """The second of two requests comes 50 ms after the first, while it is scored, and makes that 10 ms longer."""
    work = with_work(texts_per_step=64, generate_s=0.05)
    times = dataclasses.replace(FIXED, front_s=0.01)
    apart = FleetSettings(work, times, batch_tokens=4000)
    together = dataclasses.replace(apart, times=dataclasses.replace(times, one_core=True))
    # 10 ms of front end, two passes of 100 ms, less the 50 ms between the two requests.
    assert simulate(apart).wait_s == pytest.approx(0.01 + 0.2 - 0.05)
    assert simulate(together).wait_s == pytest.approx(0.01 + 0.2 - 0.05 + 0.01)


def test_a_slow_replica_takes_as_much_longer() -> None:
    found = simulate(FleetSettings(ONE_REQUEST, FIXED, batch_tokens=2000, speeds={0: 0.5}))
    assert found.wait_s == pytest.approx(0.2)


def single_texts(step_s: float) -> Workload:
    """One text a step, far apart: many such trainers are nearly a Poisson process."""
    return Workload(
        generate_s=step_s,
        evaluate_s=0.0,
        update_s=0.0,
        texts_per_step=1,
        chunk_texts=1,
        tokens_per_text=10.0,
        spread=0.5,
    )


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_single_server_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) services. A batch has one text; 400 trainers are nearly Poisson."""
    service_s, trainers = 0.1, 400
    expected_s = service_s * (1 + load / (2 * (1 - load)))
    # A step is its own time and the answer's: together they give the load.
    workload = single_texts(trainers * service_s / load - expected_s)
    settings = FleetSettings(
        workload, ServiceTimes.linear(service_s, 0.0), trainers=trainers, batch_tokens=1, max_queue_tokens=10**9
    )
    found = simulate(settings, warm_up_s=200, seconds=1500)
    assert found.utilisation == pytest.approx(load, rel=0.03)
    assert found.latency_mean_s == pytest.approx(expected_s, rel=0.1)


def test_utilisation_is_rate_times_service_time() -> None:
    workload = dataclasses.replace(single_texts(20.0), spread=0.2)
    found = simulate(FleetSettings(workload, FIXED, trainers=100, replicas=2, batch_tokens=1), seconds=1000)
    assert found.utilisation == pytest.approx(found.texts_per_s * 0.1 / 2, rel=0.01)


def test_littles_law_holds_in_the_queues() -> None:
    """The mean number of texts in the engines, counted every so often, is their rate times their time in them."""
    settings = FleetSettings(single_texts(25.0), FIXED, trainers=400, replicas=2, batch_tokens=1)
    fleet = Fleet(settings)
    counted: list[int] = []
    for at in itertools.count(100, 0.37):
        if at > 600:
            break
        fleet.environment.run(until=at)
        counted.append(sum(replica.engine.queued_texts for replica in fleet.replicas))
    found = simulate(settings, warm_up_s=100, seconds=500)
    assert sum(counted) / len(counted) == pytest.approx(found.texts_per_s * found.latency_mean_s, rel=0.05)


BUSY = Workload(
    generate_s=0.5, evaluate_s=0.1, update_s=1.0, texts_per_step=128, chunk_texts=64, tokens_per_text=20, spread=0.3
)
TROUBLES: dict[str, dict[str, Any]] = {
    "none": {},
    "refusals": {"max_queue_tokens": 1500},
    "deaths": {"failure_every_s": 3.0, "restart_s": 2.0},
    "deaths of the only one": {"replicas": 1, "failure_every_s": 5.0, "restart_s": 2.0},
    "hedging": {"balancer": False, "hedge_after_s": 0.05},
    "hedging and deaths": {"balancer": False, "hedge_after_s": 0.05, "failure_every_s": 3.0, "restart_s": 2.0},
    "short patience": {"request_timeout_s": 0.1},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_no_request_is_lost_or_answered_twice(trouble: str) -> None:
    """Every request of a step that has ended was answered once, and nothing is left when no trainer asks."""
    settings = FleetSettings(
        BUSY,
        ServiceTimes.linear(0.02, 5e-5, front_s=0.002),
        **{"trainers": 8, "replicas": 2} | TROUBLES[trouble],
    )
    fleet = Fleet(settings)
    fleet.environment.run(until=60.0)
    seen = fleet.seen
    assert len(seen.steps) > 8
    for trainer in range(8):
        waits = sum(number == trainer for number, _, _ in seen.waits)
        answered = sum(texts for number, _, _, texts in seen.answers if number == trainer)
        assert waits * 128 <= answered <= (waits + 1) * 128
    in_progress = seen.sent - len(seen.answers)
    assert 0 <= in_progress <= 8 * BUSY.requests_per_step
    assert bool(seen.refusals) == (trouble == "refusals")
    assert bool(seen.losses) == ("deaths" in trouble or trouble == "short patience")
    for replica in fleet.replicas:
        assert replica.engine.queued_texts >= 0
        assert replica.in_progress >= 0


def test_the_same_seed_gives_the_same_figures() -> None:
    settings = FleetSettings(BUSY, FIXED, trainers=4, failure_every_s=10.0, restart_s=1.0)
    assert simulate(settings) == simulate(settings)
    assert simulate(settings) != simulate(dataclasses.replace(settings, seed=1))


def test_a_second_replica_halves_the_load() -> None:
    one = simulate(FleetSettings(BUSY, ServiceTimes.linear(0.02, 1e-5), trainers=8))
    two = simulate(FleetSettings(BUSY, ServiceTimes.linear(0.02, 1e-5), trainers=8, replicas=2))
    assert two.utilisation < 0.65 * one.utilisation
    assert two.wait_s < one.wait_s


def test_trainers_of_one_kind_get_equal_shares_of_an_overload() -> None:
    """A queue with room for half of them refuses; nobody starves."""
    settings = FleetSettings(BUSY, ServiceTimes.linear(0.1, 2e-4), trainers=20, max_queue_tokens=20_000)
    found = simulate(settings, warm_up_s=60, seconds=300)
    assert found.refused > 0
    assert found.share_smallest > 0.8
    assert found.share_largest < 1.2


def test_hedging_hides_a_slow_replica() -> None:
    slow = FleetSettings(
        dataclasses.replace(BUSY, update_s=5.0),
        ServiceTimes.linear(0.02, 5e-5),
        trainers=2,
        replicas=4,
        balancer=False,
        speeds={0: 0.02},
    )
    hedged = dataclasses.replace(slow, hedge_after_s=0.3)
    without, with_hedges = simulate(slow, seconds=200), simulate(hedged, seconds=200)
    assert with_hedges.hedges > 0
    assert with_hedges.wait_s < 0.7 * without.wait_s


def signals(queue: float) -> Iterator[Signal]:
    return iter([Signal(queue=queue, requests=0.0, busy=0.0)])


@pytest.mark.parametrize(
    ("queue", "replicas", "wanted"), [(64, 2, 2), (70, 2, 2), (96, 2, 3), (640, 2, 8), (0, 2, 1), (200, 1, 4)]
)
def test_the_autoscaler_wants_replicas_in_proportion(queue: float, replicas: int, wanted: int) -> None:
    """ceil(replicas x signal / 64), between 1 and 8; a tenth over the target changes nothing."""
    assert Autoscaler(target=64).wanted([*signals(queue)], replicas) == wanted


def test_an_overloaded_fleet_grows_and_an_idle_one_shrinks() -> None:
    autoscaler = Autoscaler(target=64, most=6, down_after_s=60.0)
    crowded = FleetSettings(
        BUSY, ServiceTimes.linear(0.05, 1e-4), trainers=24, replicas=1, autoscaler=autoscaler, restart_s=10.0
    )
    found = simulate(crowded, warm_up_s=150, seconds=60)
    assert found.replicas_mean > 3
    idle = dataclasses.replace(crowded, trainers=1, replicas=6)
    assert simulate(idle, warm_up_s=150, seconds=60).replicas_mean == 1


def test_the_mean_size_weighs_by_time() -> None:
    assert mean_size([(0.0, 1), (10.0, 3)], 5.0, 15.0) == 2.0


def test_times_are_interpolated_and_go_on_beyond_the_table() -> None:
    times = ServiceTimes(((10.0, 1.0), (20.0, 2.0), (40.0, 6.0)))
    assert [times.batch_s(tokens) for tokens in (5, 10, 15, 30, 50)] == [0.5, 1.0, 1.5, 4.0, 8.0]
    assert ServiceTimes.from_json(times.to_json()) == times
