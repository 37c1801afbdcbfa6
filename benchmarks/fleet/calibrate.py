"""A replica's service times, measured one request at a time: seconds by tokens in a batch, and a request's other costs.

CPU times come from the processes' own counts, so that a busy machine disturbs them little; the forward pass and the
delay are medians of wall-clock times.
"""

import asyncio
import statistics
import time

import httpx
import psutil

from benchmarks.fleet.testbed import LABEL, Fleet
from benchmarks.fleet.trainers import WORDS
from plaudit.rewards.endpoint import Endpoint
from plaudit.rewards.rows import Row, rows_of
from plaudit.rewards.settings import RewardComponent
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import TOKENS_AROUND

SHAPES = ((1, 16), (4, 16), (16, 16), (16, 32), (31, 32))
"""Texts and tokens of a text in the requests whose forward pass is measured: one batch each."""
ROUNDS = 7


class _Timed(httpx.AsyncHTTPTransport):
    """Keeps the milliseconds of the last answer's phases."""

    phases: dict[str, float]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        parts = (part.strip().split(";dur=") for part in response.headers.get("server-timing", "").split(",") if part)
        self.phases = {name: float(value) / 1000 for name, value in parts}
        return response


def some_rows(texts: int, tokens: int) -> list[Row]:
    words = [WORDS[number % len(WORDS)] for number in range(tokens - TOKENS_AROUND)]
    return rows_of([words[0]] * texts, [" " + " ".join(words[1:])] * texts, {})


async def calibrate(fleet: Fleet, request_texts: int, tokens_per_text: float) -> ServiceTimes:
    """The times of replica 0, asked through the balancer while nothing else is asked."""
    async with httpx.AsyncClient(
        transport=(transport := _Timed()),
        headers={"Authorization": f"Bearer {fleet.keys[0]}", "Accept": "application/json"},
        trust_env=False,
    ) as http:
        endpoint = Endpoint(fleet.url, RewardComponent(url=(fleet.url,), label=LABEL, kind="plaudit"), http, 60.0, 8)
        table: list[tuple[float, float]] = []
        for texts, tokens in SHAPES:
            rows = some_rows(texts, tokens)
            seconds = []
            for _ in range(ROUNDS):
                await endpoint.score(rows)
                seconds.append(transport.phases["inference"])
            table.append((float(texts * tokens), statistics.median(seconds)))
        costs = {
            texts: await _costs(fleet, endpoint, transport, some_rows(texts, round(tokens_per_text)))
            for texts in (1, request_texts)
        }
    (few_front, *_), (front, client, delay) = costs[1], costs[request_texts]
    per_text = max(0.0, (front - few_front) / (request_texts - 1))
    return ServiceTimes(
        tuple(_ascending(table)),
        front_s=max(0.0, few_front - per_text),
        front_text_s=per_text,
        delay_s=delay,
        one_core=fleet.computes,
        client_s=client,
    )


async def _costs(fleet: Fleet, endpoint: Endpoint, transport: _Timed, rows: list[Row]) -> tuple[float, float, float]:
    """Seconds of a request: the services' CPU besides the forward pass, this process's CPU, and nobody's."""
    ours = psutil.Process()
    theirs = [psutil.Process(service.pid) for service in fleet.services]
    count, forward, latencies = 25, [], []
    cpu = [_cpu_s(process) for process in (ours, *theirs)]
    for _ in range(count):
        began = time.perf_counter()
        await endpoint.score(rows)
        latencies.append(time.perf_counter() - began)
        forward.append(transport.phases["inference"])
    used = [(_cpu_s(process) - before) / count for process, before in zip((ours, *theirs), cpu, strict=True)]
    # A model that computes uses the CPU during its forward pass; one that sleeps does not.
    front = max(0.0, sum(used[1:]) - (statistics.fmean(forward) if fleet.computes else 0.0))
    delay = statistics.median(latencies) - statistics.median(forward) - front - used[0]
    return front, used[0], max(0.0, delay)


def _ascending(table: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The rows by tokens, none faster than a smaller one: noise of a busy machine is not a speed-up."""
    kept: list[tuple[float, float]] = []
    for tokens, seconds in sorted(table):
        kept.append((tokens, max(seconds, kept[-1][1]) if kept else seconds))
    return kept


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def calibrated(fleet: Fleet, request_texts: int, tokens_per_text: float) -> ServiceTimes:
    """`calibrate` outside an event loop."""
    return asyncio.run(calibrate(fleet, request_texts, tokens_per_text))
