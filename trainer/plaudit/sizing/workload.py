"""What one trainer asks of the reward services: bursts of requests while it generates, then silence while it updates.

Failure modes: a run whose steps were slow because they waited for rewards is taken for one that asks rarely.
"""

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plaudit.checks import positive, require
from plaudit.errors import ConfigError
from plaudit.run.metrics import FILE_NAME, read_metrics

EVALUATE_SHARE = 0.5
"""Of a rollout without its wait, the share that a trainer evaluates after it has sent a chunk: log-probabilities,
values and reference. docs/evidence/speed.md: 0.52 for the demo's sizes, 0.56 for 124 million parameters."""
ROLLOUT, WAIT, UPDATE = "time/rollout_s", "time/reward_wait_s", "time/update_s"
QUERIES, RESPONSES = "tokens/queries_len_mean", "tokens/responses_len_mean"
TOKENS_AROUND = 2
"""Tokens that a classifier's tokenizer puts around a text."""


@dataclass(frozen=True)
class Workload:
    """One trainer's steps. Times are those of the trainer alone, without any wait for rewards."""

    generate_s: float
    """Seconds until a chunk of responses is there and its requests are sent."""
    evaluate_s: float
    """Seconds that the trainer works after it has sent a chunk, while the chunk is scored."""
    update_s: float
    """Seconds from the last reward to the next step: the updates, during which nothing is asked for."""
    texts_per_step: int
    chunk_texts: int
    """Texts generated at once (`generation.batch_size`)."""
    request_texts: int = 32
    """Texts in one request, at most (`reward.chunk_size`)."""
    tokens_per_text: float = 24.0
    """Tokens of prompt and response, as the judge counts them, on average."""
    in_flight: int = 8
    """Requests of one trainer at the same time, at most (`reward.max_in_flight`)."""
    spread: float = 0.1
    """Standard deviation of the step's times, as a share of them."""

    def __post_init__(self) -> None:
        positive(self, "generate_s", "texts_per_step", "chunk_texts", "request_texts", "tokens_per_text", "in_flight")
        for name in ("evaluate_s", "update_s", "spread"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name}={value} must be 0 or more")

    @property
    def chunks(self) -> list[list[int]]:
        """The step's chunks in order, each as the number of texts of its requests."""
        sizes = [
            min(self.chunk_texts, self.texts_per_step - begun)
            for begun in range(0, self.texts_per_step, self.chunk_texts)
        ]
        return [[min(self.request_texts, size - sent) for sent in range(0, size, self.request_texts)] for size in sizes]

    @property
    def requests_per_step(self) -> int:
        """How many requests a step sends."""
        return sum(map(len, self.chunks))

    @property
    def step_s(self) -> float:
        """Seconds of a step that waits for nothing."""
        return len(self.chunks) * (self.generate_s + self.evaluate_s) + self.update_s

    @property
    def tokens_per_step(self) -> float:
        """Tokens that the reward services score in a step."""
        return self.texts_per_step * self.tokens_per_text

    def stretched(self, factor: float) -> "Workload":
        """The same texts from a trainer that takes `factor` times as long for its own work."""
        return dataclasses.replace(
            self,
            generate_s=self.generate_s * factor,
            evaluate_s=self.evaluate_s * factor,
            update_s=self.update_s * factor,
        )


class Draws:
    """One trainer's random numbers, by its number: the same for a simulated trainer and for one of the benchmarks."""

    SHORTEST = 0.1

    def __init__(self, workload: Workload, number: int, seed: int = 0) -> None:
        self._random = random.Random(seed * 1_000_003 + number)
        self._spread = workload.spread
        mean = workload.tokens_per_text
        self.tokens = [max(4, round(self._random.uniform(0.5, 1.5) * mean)) for _ in range(workload.texts_per_step)]
        """Of each text of a step: half to one and a half times the mean."""
        self.first_pause_s = self._random.uniform(0, workload.step_s)
        """Until the first step, so that trainers don't step together."""

    def jittered(self, seconds: float) -> float:
        """A time of a step, which differs from step to step."""
        return seconds * max(self.SHORTEST, self._random.gauss(1.0, self._spread))


def from_metrics(
    records: Sequence[Mapping[str, float]],
    *,
    texts_per_step: int,
    chunk_texts: int,
    request_texts: int = 32,
    tokens_per_text: float,
    in_flight: int = 8,
    evaluate_share: float = EVALUATE_SHARE,
) -> Workload:
    """The workload of a run, from its metrics (`plaudit.run.metrics.read_metrics`). The first step warms up.

    Medians over the steps, so a pause of the machine does not count. What the run waited for rewards is taken out.

    Raises:
        ConfigError: there are fewer than two steps, or a record has no times.
    """
    timed = [record for record in records[1:] if {ROLLOUT, WAIT, UPDATE} <= record.keys()]
    if not timed:
        raise ConfigError(
            f"{len(records)} steps in the metrics, and the first one only warms up: run at least two steps, or give "
            "the step's times"
        )
    chunks = math.ceil(texts_per_step / chunk_texts)
    rollouts = [record[ROLLOUT] - record[WAIT] for record in timed]
    updates = [record[UPDATE] for record in timed]
    chunk_s = statistics.median(rollouts) / chunks
    steps = [rollout + update for rollout, update in zip(rollouts, updates, strict=True)]
    quarters = statistics.quantiles(steps, n=4) if len(steps) > 3 else [steps[0]] * 3
    # The quartiles of a normal distribution are 1.35 standard deviations apart.
    spread = min(0.5, (quarters[2] - quarters[0]) / 1.35 / quarters[1])
    return Workload(
        generate_s=chunk_s * (1 - evaluate_share),
        evaluate_s=chunk_s * evaluate_share,
        update_s=statistics.median(updates),
        texts_per_step=texts_per_step,
        chunk_texts=chunk_texts,
        request_texts=request_texts,
        tokens_per_text=tokens_per_text,
        in_flight=in_flight,
        spread=spread,
    )


def from_run(directory: Path, *, tokens_per_text: float | None = None) -> Workload:
    """The workload of a PPO run, from the `metrics.jsonl` and `run.json` in its directory, or in `ppo` of a demo's.

    The judge's tokens of a text are taken to be as many as the policy's, of prompt and response, and two around them.
    `tokens_per_text` is a better number if one is known.

    Raises:
        ConfigError: a file is missing, unreadable or holds too few steps.
    """
    place = next((place for place in (directory, directory / "ppo") if (place / FILE_NAME).exists()), None)
    if place is None:
        raise ConfigError(f"{directory} has no {FILE_NAME}: name the directory of a run of `plaudit ppo`")
    records = read_metrics(place / FILE_NAME)
    try:
        settings = json.loads((place / "run.json").read_text(encoding="utf-8"))
        texts, chunk = settings["ppo"]["batch_size"], settings["generation"]["batch_size"]
        request, in_flight = settings["reward"]["chunk_size"], settings["reward"]["max_in_flight"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{place / 'run.json'} can't be read as a run's settings: {error!r}") from error
    lengths = [r[QUERIES] + r[RESPONSES] for r in records[1:] if {QUERIES, RESPONSES} <= r.keys()]
    if tokens_per_text is None and not lengths:
        raise ConfigError(f"{place / FILE_NAME} has no lengths of texts: give the judge's tokens of a text")
    return from_metrics(
        records,
        texts_per_step=texts,
        chunk_texts=chunk,
        request_texts=request,
        tokens_per_text=tokens_per_text or statistics.fmean(lengths) + TOKENS_AROUND,
        in_flight=in_flight,
    )
