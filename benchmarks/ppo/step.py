"""Where the time of a PPO step goes, and how that compares with the machine and with the classic recipe.

    python -m benchmarks.ppo.step --size demo --classic-python classic/bin/python

Sizes: `demo`, the embedded models; `124m` and `1b`, GPT-2s with random weights judged by a DistilBERT-base with random
weights. Rewards come over HTTP from a service on the same machine. Settings are the recipe's: 128 prompts of 2 to 8
tokens, responses of 4 to 16, one mini-batch, 4 epochs. `--classic-python` names the Python of an environment with TRL
0.11.4 for `benchmarks.ppo.classic_recipe` (its docstring says how to make one). `--classic-api` runs the same
program, one query at a time, over `plaudit.classic` as well, each time directly before TRL. All take turns on the same
models and prompts, `--rounds` times. Prints Markdown tables, and the ratios with those of each round.

The roofline: operations that a phase cannot do without (real tokens through the weights, forward and backward; the
language model head on response tokens alone) over its time, as a share of the rate of one large matrix product measured
in the same run.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from plaudit.data.prompts import Prompts, load_prompts
from plaudit.learner.memory import keep_freed_memory, measuring_peak
from plaudit.learner.rollout import collect_rollout, sampler
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.generation import Draws
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.samples import Samples
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings
from plaudit.run.service_process import reward_service
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOHyperparameters

PHASES = ("generate", "reward", "evaluate", "update", "step")
SMALL_POLICY, SMALL_JUDGE = Path("models/imdb-gpt2-mini"), Path("models/imdb-distilbert-mini")
SIZES = {"124m": GPT2Config(), "1b": GPT2Config(n_embd=1536, n_layer=32, n_head=16)}


@dataclass(frozen=True)
class Models:
    policy: Path
    judge: Path


def models_of(size: str, directory: Path) -> Models:
    """The models of a size; those with random weights are written to `directory`, with the embedded tokenizers."""
    if size == "demo":
        return Models(SMALL_POLICY, SMALL_JUDGE)
    torch.manual_seed(0)
    models = Models(directory / "policy", directory / "judge")
    GPT2LMHeadModel(SIZES[size]).save_pretrained(models.policy)
    DistilBertForSequenceClassification(
        DistilBertConfig(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    ).save_pretrained(models.judge)
    AutoTokenizer.from_pretrained(SMALL_POLICY).save_pretrained(models.policy)
    AutoTokenizer.from_pretrained(SMALL_JUDGE).save_pretrained(models.judge)
    return models


class Timed:
    """Adds up the seconds spent in a function."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.seconds = 0.0
        self._function, self._device = function, device

    def __call__(self, *args: Any, **options: Any) -> Any:
        began = now(self._device)
        try:
            return self._function(*args, **options)
        finally:
            self.seconds += now(self._device) - began


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    """Plaudit's step on one set of models."""

    def __init__(self, models: Models, prompts: Prompts, client: RewardClient, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        keep_freed_memory()
        lora = LoraSettings(r=arguments.lora_r, alpha=2 * arguments.lora_r) if arguments.lora_r else LoraSettings(False)
        settings = ModelSettings(bf16=arguments.bf16, compile=arguments.compile)
        self.policy = load_policy(models.policy, lora, settings, device=arguments.device)
        count = arguments.batch_size
        self.stepper = PPOStepper(self.policy, None, PPOHyperparameters(batch_size=count, mini_batch_size=count))
        self._tokenizer = load_tokenizer(models.policy)
        self._prompts, self._client = prompts, client
        self._generation = GenerationSettings(batch_size=arguments.chunk)
        self._sample = sampler(self.policy, self._generation, self._tokenizer)
        self.samples: Samples | None = None

    def step(self, index: int) -> dict[str, float]:
        count, device = self.stepper.config.batch_size, self.policy.device
        start = index * count % (len(self._prompts) - count + 1)
        prompts = self._prompts.rows(start, start + count)
        draws = Draws.of(self._generation, count, seed=0, step=index)
        evaluate = Timed(type(self.stepper).evaluate.__get__(self.stepper), device)
        self.stepper.evaluate = evaluate  # type: ignore[method-assign]
        began = now(device)
        with measuring_peak(device) as rollout_peak:
            collected = collect_rollout(
                self.stepper,
                self._tokenizer,
                prompts,
                draws,
                self._generation,
                self._client,
                sample=self._sample,
            )
        at_update = now(device)
        with measuring_peak(device) as update_peak:
            result = self.stepper.update(collected.rollout)
        ended = now(device)
        self.samples = collected.rollout.samples
        return {
            "generate": at_update - began - evaluate.seconds - collected.waited_s,
            "reward": collected.waited_s,
            "evaluate": evaluate.seconds,
            "update": ended - at_update,
            "step": ended - began,
            "samples": count,
            "rollout_peak_mib": rollout_peak.mib,
            "update_peak_mib": update_peak.mib,
            "ratio_drift": result.statistics["ppo/policy/ratio_drift"],
        }

    def operations(self) -> dict[str, float]:
        """The least floating-point operations of each phase of the last step."""
        assert self.samples is not None
        model = self.policy.language_model
        embeddings = {
            id(p) for p in (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters())
        }
        trunk = sum(
            p.numel() for n, p in model.named_parameters() if p.ndim == 2 and id(p) not in embeddings and "wpe" not in n
        )
        head = model.get_output_embeddings().weight.numel()
        responses = int(self.samples.mask.sum())
        tokens = int(self.samples.query_mask.sum()) + responses - len(self.samples)
        forward = 2 * (trunk * tokens + head * responses)
        backward = 1 if self.policy.has_adapters else 2
        return {
            "generate": forward,
            "evaluate": 2 * forward,
            "update": (1 + backward) * forward * self.stepper.config.ppo_epochs,
        }


def product_rate(arguments: argparse.Namespace) -> float:
    """Operations a second of large matrix products, the median of several."""
    device, dtype = torch.device(arguments.device), torch.bfloat16 if arguments.bf16 else torch.float32
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, rates = torch.empty_like(a), []
    for _ in range(8):
        began = now(device)
        torch.mm(a, b, out=out)
        rates.append(2 * size**3 / (now(device) - began))
    return statistics.median(rates[2:])


@contextlib.contextmanager
def judged(models: Models) -> Iterator[RewardClient]:
    with (
        tempfile.TemporaryDirectory() as directory,
        reward_service(str(models.judge), Path(directory), ready_timeout_s=300.0) as url,
        RewardClient(RewardSettings.of(url=(url,), label="POSITIVE")) as client,
    ):
        client.connect()
        yield client


def classic_steps(
    python: str, library: str, models: Models, prompts: Path, arguments: argparse.Namespace, lora_r: int
) -> list[dict[str, float]]:
    command = [python, str(Path(__file__).with_name("classic_recipe.py")), "--library", library]
    command += ["--policy", str(models.policy), "--reward-model", str(models.judge), "--prompts", str(prompts)]
    command += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size), "--lora-r", str(lora_r)]
    command += ["--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the classic recipe failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def counted(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps of one turn without the first of several, which is a warm-up."""
    return steps[1:] or steps


def median(steps: list[dict[str, float]]) -> dict[str, float]:
    """Phase by phase."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


Turns = list[list[dict[str, float]]]
"""The steps of each round."""


def ratio_lines(name: str, turns: Turns, other: str, other_turns: Turns) -> Iterator[str]:
    """How many times as many samples/s `name` has as `other`: the median over the rounds, and each round's own.

    The same by processor time, on which other processes of the machine have less influence, where both run alone in
    their process.
    """
    for what, clock in (("", "step"), (" by processor time", "processor")):
        if clock in turns[0][0]:
            ratios = [
                statistics.median(step[clock] / step["samples"] for step in theirs)
                / statistics.median(step[clock] / step["samples"] for step in own)
                for own, theirs in zip(turns, other_turns, strict=True)
            ]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            yield f"{name}: {statistics.median(ratios):.2f} x the samples/s of {other}{what} (round by round: {each})"


def row(name: str, step: dict[str, float]) -> str:
    seconds = " | ".join(f"{step[phase]:.3f}" for phase in PHASES)
    return f"| {name} | {seconds} | {step['samples'] / step['step']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", *SIZES], default="demo")
    parser.add_argument("--steps", type=int, default=4, help="of each; the first is a warm-up if there are several")
    parser.add_argument("--rounds", type=int, default=1, help="how often ours and the classic recipe take turns")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=128, help="prompts generated at once")
    parser.add_argument("--lora-r", type=int, default=16, help="0 trains every parameter")
    parser.add_argument("--classic-api", action="store_true", help="the classic recipe over plaudit.classic as well")
    parser.add_argument("--classic-python", help="Python of the environment with trl 0.11.4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="ours only; the classic recipe stays in fp32")
    parser.add_argument("--compile", action="store_true", help="ours only; the first step compiles")
    arguments = parser.parse_args()

    with contextlib.ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory()))
        models = models_of(arguments.size, directory)
        tokenizer = load_tokenizer(models.policy)
        count = max(2, arguments.steps) * arguments.batch_size
        prompts = load_prompts(DataSettings("movie-reviews"), PromptSettings(), tokenizer, "train", seed=0, limit=count)
        prompt_file = directory / "prompts.json"
        prompt_file.write_text(json.dumps([list(map(int, ids)) for ids in prompts.token_ids]))

        classics = [(sys.executable, "plaudit.classic", "plaudit.classic")] if arguments.classic_api else []
        if arguments.classic_python:
            classics.append((arguments.classic_python, "trl", "trl 0.11.4"))
        rounds: dict[str, Turns] = {"plaudit": []}
        with judged(models) as client:
            ours = Ours(models, prompts, client, arguments)
            for _ in range(arguments.rounds):
                rounds["plaudit"].append(counted([ours.step(index) for index in range(arguments.steps)]))
                for what, lora_r in (("as published", 0), ("same LoRA", arguments.lora_r)):
                    for python, library, version in classics:
                        steps = classic_steps(python, library, models, prompt_file, arguments, lora_r)
                        rounds.setdefault(f"{version}, {what}", []).append(counted(steps))
        rate = product_rate(arguments)

    steps_of = {name: median([step for steps in taken for step in steps]) for name, taken in rounds.items()}
    step = steps_of["plaudit"]
    print(
        f"\n{arguments.size}, {arguments.device}, {torch.get_num_threads()} threads, "
        f"matrix products at {rate / 1e9:.0f} GFLOP/s\n"
    )
    print(f"| seconds | {' | '.join(PHASES)} | samples/s |")
    print(f"| --- |{' ---: |' * (len(PHASES) + 1)}")
    for name in rounds:
        print(row(name, steps_of[name]))
    for name in rounds:
        if name.startswith("trl"):
            for faster in ("plaudit", name.replace("trl 0.11.4", "plaudit.classic")):
                if faster in rounds:
                    print("", *ratio_lines(faster, rounds[faster], name, rounds[name]), sep="\n")
    operations = ours.operations()
    print("\n| phase | GFLOP | share of the roofline |\n| --- | ---: | ---: |")
    for phase, needed in operations.items():
        print(f"| {phase} | {needed / 1e9:.0f} | {needed / step[phase] / rate:.0%} |")
    print(f"\npeak memory: rollout {step['rollout_peak_mib']:.0f} MiB, update {step['update_peak_mib']:.0f} MiB")
    print(f"largest distance of a ratio from 1 at the first mini-batch: {step['ratio_drift']:.1e}")


if __name__ == "__main__":
    main()
