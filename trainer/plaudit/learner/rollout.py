"""Collect rollouts: generate responses, request their scores, and evaluate them under the policy meanwhile.

Failure modes: a score is assigned to another response; a step waits for results that it doesn't need yet.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from plaudit.data.prompts import Prompts, PromptSchedule
from plaudit.errors import ConfigError
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.processes import Processes
from plaudit.policy.endings import Endings
from plaudit.policy.generation import Draws, generate
from plaudit.policy.model import Policy
from plaudit.policy.samples import EvaluatedSamples, Rollout, Samples
from plaudit.policy.static_generation import StaticGenerator, supports
from plaudit.policy.tokenizer import Tokenizer
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.rewards import Scores
from plaudit.settings.policy import GenerationSettings
from plaudit.wire import ChatMessage

T = TypeVar("T")


class Rewarder(Protocol):
    """Scores completions, for example `RewardClient` over HTTP."""

    def submit_components(
        self,
        prompts: Sequence[str | Sequence[ChatMessage]],
        responses: Sequence[str],
        fields: Mapping[str, Sequence[Any]] | None = None,
    ) -> "Future[Scores]":
        """Scores for as many completions as there are prompts, in their order. Does not wait for them."""


Sampler = Callable[[Sequence[Sequence[int]], Draws], Samples]
"""One response for each query, from the policy as it is now."""


@dataclass(frozen=True)
class CollectedRollout:
    """A rollout with its texts, as the reward service saw them."""

    rollout: Rollout
    prompts: list[str]
    """As texts for people."""
    fields: dict[str, list[Any]]
    """Further columns of the prompts' rows, by name."""
    responses: list[str]
    ended: list[bool]
    """Whether each response ended with an end token or a stop string."""
    components: dict[str, list[float]]
    """Each reward by its name, before its weight; `rollout.scores` combines them."""
    waited_s: float
    """Time spent waiting for rewards after everything else was done."""

    @classmethod
    def concatenate(cls, parts: Sequence["CollectedRollout"]) -> "CollectedRollout":
        """All rows in order; the longest of the waits, since they were at the same time."""
        scores = torch.cat([part.rollout.scores for part in parts])
        return cls(
            rollout=EvaluatedSamples.concatenate([part.rollout for part in parts]).with_scores(scores),
            prompts=[text for part in parts for text in part.prompts],
            fields=_concatenated([part.fields for part in parts]),
            responses=[text for part in parts for text in part.responses],
            ended=[ended for part in parts for ended in part.ended],
            components=_concatenated([part.components for part in parts]),
            waited_s=max(part.waited_s for part in parts),
        )

    def to(self, device: torch.device | str) -> "CollectedRollout":
        """The same on another device."""
        return dataclasses.replace(self, rollout=self.rollout.to(device))


def wait_for(future: "Future[Scores]") -> Scores:
    """The plain wait; a stage passes one that also watches for signals."""
    return future.result()


def sampler(
    policy: Policy,
    settings: GenerationSettings,
    tokenizer: Tokenizer,
    *,
    cached: bool = True,
    processes: Processes | None = None,
) -> Sampler:
    """How a run samples from its policy: with fixed shapes where settings or device ask for it.

    Turn `cached` off for a model whose cache does not hold keys and values (see `policy.checks.check_policy`).

    Raises:
        ConfigError: the settings insist on fixed shapes, and the model can't generate with them.
    """
    processes = processes or Processes()
    if not cached and not settings.static_cache:
        return functools.partial(generate_uncached, policy.language_model, settings=settings, tokenizer=tokenizer)
    model, static = policy.language_model, settings.static_cache
    if static is None:
        # Graphs remember the addresses of weights, and each all-gather of sharded ones gives them other addresses.
        static = policy.device.type == "cuda" and not processes.is_sharded
    if static:
        with policy.generating():
            supported = supports(model)
        if supported:
            return StaticGenerator(model, settings, tokenizer)
        if settings.static_cache:
            raise ConfigError(
                f"generation.static_cache=True: {type(model).__name__} does not generate with fixed shapes; "
                "leave the setting out"
            )
    return functools.partial(generate, model, settings=settings, tokenizer=tokenizer)


def collect_rollout(
    stepper: PPOStepper,
    tokenizer: Tokenizer,
    prompts: Prompts,
    draws: Draws,
    settings: GenerationSettings,
    rewarder: Rewarder,
    *,
    sample: Sampler | None = None,
    wait: Callable[["Future[Scores]"], Scores] = wait_for,
) -> CollectedRollout:
    """Generate, score and evaluate. A chunk is scored while it is evaluated and the next chunk is generated.

    Pass the same `sampler` to every step; what it sets up is used again.

    Raises:
        RewardUnavailable, RewardRejected: a chunk got no rewards.
    """
    sample = sample or sampler(stepper.policy, settings, tokenizer)
    endings = Endings.of(stepper.policy.language_model, tokenizer, settings)
    evaluations, pending, responses, ended = [], [], [], []
    for start, stop in _chunks(len(prompts), settings.batch_size):
        chunk = prompts.rows(start, stop)
        with stepper.policy.generating():
            samples = sample(chunk.token_ids, draws.rows(start, stop))
        texts = endings.texts(samples)
        pending.append(rewarder.submit_components(chunk.judged, texts, chunk.fields))
        responses += texts
        ended += endings.ended(samples)
        evaluations.append(stepper.evaluate(samples))
    began_waiting = time.perf_counter()
    scored = [wait(future) for future in pending]
    waited_s = time.perf_counter() - began_waiting
    scores = torch.tensor([score for chunk in scored for score in chunk.totals])
    rollout = EvaluatedSamples.concatenate(evaluations).with_scores(scores.to(stepper.policy.device))
    components = _concatenated([chunk.components for chunk in scored])
    return CollectedRollout(rollout, prompts.texts, prompts.fields, responses, ended, components, waited_s)


@dataclass(frozen=True)
class RolloutCollector:
    """The rollouts of a run: which prompts, how to sample, and who scores."""

    stepper: PPOStepper
    tokenizer: Tokenizer
    schedule: PromptSchedule
    settings: GenerationSettings
    rewarder: Rewarder
    sample: Sampler
    wait: Callable[["Future[Scores]"], Scores]
    seed: int

    def collect(self, step: int) -> CollectedRollout:
        """The rollout of this step, on the policy's device. All processes call this, and get the whole batch.

        Raises:
            RewardUnavailable, RewardRejected: a chunk got no rewards, in this process or another.
        """
        policy, processes = self.stepper.policy, self.stepper.processes
        # The all-gather of sharded weights is outside: no process can tell the others that it failed in it.
        with processes.gathered_weights(policy):
            return CollectedRollout.concatenate(processes.on_all(self._collect_own_rows, step)).to(policy.device)

    def _collect_own_rows(self, step: int) -> CollectedRollout:
        """This process's rows. Prompts and draws are those of the batch: they don't depend on the processes."""
        prompts = self.schedule.batch(step)
        draws = Draws.of(self.settings, len(prompts), seed=self.seed, step=step)
        rows = self.stepper.processes.share(len(prompts), group=self.stepper.config.responses_per_prompt)
        collected = collect_rollout(
            self.stepper,
            self.tokenizer,
            prompts.rows(rows.start, rows.stop),
            draws.rows(rows.start, rows.stop),
            self.settings,
            self.rewarder,
            sample=self.sample,
            wait=self.wait,
        )
        return collected if self.stepper.processes.count == 1 else collected.to("cpu")


def _concatenated(parts: Sequence[Mapping[str, list[T]]]) -> dict[str, list[T]]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)
