"""The advice keeps its promise in the simulation, and says clearly when there is none."""

import dataclasses
import math
import xml.etree.ElementTree as ElementTree

import pytest

from plaudit.errors import ConfigError
from plaudit.sizing.advice import advise, best_batch_tokens, queue_tokens
from plaudit.sizing.curve import svg_of
from plaudit.sizing.fleet import FleetSettings, simulate
from plaudit.sizing.judges import JUDGES, judge_times
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import Workload

WORKLOAD = Workload(
    generate_s=0.5, evaluate_s=0.5, update_s=2.0, texts_per_step=64, chunk_texts=64, tokens_per_text=20, spread=0.1
)
TIMES = ServiceTimes.linear(0.05, 2e-4)


@pytest.mark.parametrize("trainers", [1, 6, 12])
def test_the_advised_number_is_enough_and_one_fewer_is_not(trainers: int) -> None:
    advice = advise(WORKLOAD, TIMES, trainers, 0.02)
    settings = FleetSettings(
        WORKLOAD, TIMES, trainers=trainers, replicas=advice.replicas, batch_tokens=advice.batch_tokens
    )
    assert simulate(settings, seconds=150).wait_share <= 0.025
    if advice.replicas > 1:
        assert advice.one_down.wait_share > 0.02
        fewer = dataclasses.replace(settings, replicas=advice.replicas - 1)
        assert simulate(fewer, seconds=150).wait_share > 0.015


def test_the_load_is_the_trainers_tokens_over_a_replicas_rate() -> None:
    times = ServiceTimes(((1.0, 1e-3), (10_000.0, 10.0)))  # a millisecond a token, whatever the batch
    advice = advise(WORKLOAD, times, 2, 0.5)
    assert advice.load == pytest.approx(2 * 64 * 20 / 3.0 / 1000, rel=0.01)


def test_no_number_of_replicas_makes_a_single_request_faster() -> None:
    with pytest.raises(ConfigError, match=r"no number of replicas keeps the wait below 2\.0%"):
        advise(WORKLOAD, ServiceTimes.linear(5.0, 0.0), 2, 0.02)


def test_a_batch_grows_while_its_tokens_get_cheaper() -> None:
    assert best_batch_tokens(ServiceTimes.linear(0.0, 1e-3), WORKLOAD) == 256
    assert best_batch_tokens(ServiceTimes.linear(10.0, 1e-9), WORKLOAD) == 16_384
    assert best_batch_tokens(ServiceTimes(((0.0, 10.0), (600.0, 10.0))), WORKLOAD) == 1024
    # 256 tokens take 0.75 ms each, 512 0.63, 1024 0.56, 2048 0.53, 4096 0.52: the step to 4096 saves less than 5 %.
    assert best_batch_tokens(ServiceTimes.linear(0.064, 5e-4), WORKLOAD) == 2048


def test_a_queue_holds_no_more_than_half_a_timeout() -> None:
    assert queue_tokens(1000.0, WORKLOAD, trainers=100, replicas=1) == 16_384  # 30 s are 30,000 tokens
    assert queue_tokens(1e6, WORKLOAD, trainers=1, replicas=1) == 65_536
    burst = 2 * 100 * 64 * 20
    assert queue_tokens(1e6, WORKLOAD, trainers=100, replicas=1) == 2 ** math.ceil(math.log2(burst))


def test_the_autoscalers_target_is_littles_law() -> None:
    advice = advise(WORKLOAD, TIMES, 6, 0.02)
    in_progress = advice.chosen.texts_per_s * advice.chosen.latency_mean_s / advice.replicas
    assert advice.queue_items_target == math.ceil(in_progress)


def test_the_curve_is_a_picture_of_every_point() -> None:
    advice = advise(WORKLOAD, TIMES, 6, 0.02)
    picture = ElementTree.fromstring(svg_of(advice))
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == len(advice.points)


@pytest.mark.parametrize("name", JUDGES)
def test_larger_batches_of_every_known_judge_take_longer_and_less_for_a_token(name: str) -> None:
    times = judge_times(name)
    seconds = [times.batch_s(tokens) for tokens in (64, 256, 1024)]
    assert seconds == sorted(seconds)
    assert seconds[0] / 64 > seconds[2] / 1024
