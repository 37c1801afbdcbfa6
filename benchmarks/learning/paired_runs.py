"""One training run of either side of `benchmarks.learning.against_trl`, and what is kept of it: a JSON file.

Failure modes: sides with different prompts, lengths or settings; a result that was made with other settings than those
that ask for it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.learning.analysis import Curve, Judged
from benchmarks.ranking.loop_experiment import policy_at
from plaudit.data.prompts import PromptSchedule, load_prompts
from plaudit.policy.generation import Draws
from plaudit.policy.pretrained import load_tokenizer
from plaudit.run.metrics import FILE_NAME, KL, REWARD_MEAN, read_metrics
from plaudit.run.storage import write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig, PPOSettings
from plaudit.stages import ppo

TRL, PLAUDIT, PRESET = "trl", "plaudit", "preset"
CLASSIC_PROGRAM = Path(__file__).with_name("classic_run.py")


@dataclass(frozen=True)
class Point:
    """Settings that both sides take under the same names."""

    learning_rate: float
    init_kl_coef: float

    def __str__(self) -> str:
        return f"lr-{self.learning_rate:g}-kl-{self.init_kl_coef:g}"


@dataclass(frozen=True)
class Task:
    """What both sides of a comparison have in common, besides the point of the grid."""

    name: str
    config: PPOConfig
    """Models, data, adapters, rewards and response lengths; its `ppo` is that of the preset's side."""
    judge: str
    steps: int
    batch_size: int
    mini_batch_size: int
    checkpoints: tuple[int, ...]
    """Steps after which the policy is judged on held-out prompts."""

    def settings(self, point: Point) -> dict[str, Any]:
        """The hyperparameters, under the names that TRL and Plaudit share; all others have the same defaults."""
        return {
            "learning_rate": point.learning_rate,
            "init_kl_coef": point.init_kl_coef,
            "batch_size": self.batch_size,
            "mini_batch_size": self.mini_batch_size,
            "ppo_epochs": 4,
            "target": 6.0,
        }


@dataclass(frozen=True)
class Run:
    """One run of one side. `point` is None for the side with a preset's settings."""

    task: Task
    side: str
    point: Point | None
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join([self.side, *([] if self.point is None else [str(self.point)]), f"seed-{self.seed}"])

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the file names."""
        if self.point is not None:
            return self.task.settings(self.point)
        own = self.task.config.ppo
        changed = {name: value for name, value in to_dict(own).items() if value != to_dict(PPOSettings())[name]}
        return changed | {"batch_size": self.task.batch_size, "mini_batch_size": self.task.mini_batch_size}


@dataclass(frozen=True)
class Result:
    """What a file holds. Steps are means over a step's samples; `held_out` goes by the number of steps taken."""

    run: str
    hyperparameters: Mapping[str, Any]
    rewards: Sequence[float]
    kls: Sequence[float]
    held_out: Mapping[str, Judged] = field(default_factory=dict)

    def curve(self, start: Judged) -> Curve:
        """The policies on the held-out prompts, from the one before training on."""
        return [start, *(self.held_out[step] for step in sorted(self.held_out, key=int))]


def result_of(
    run: Run, results: Path, work: Path, *, classic_python: str | None, judge: Callable[[str], Judged]
) -> Result:
    """The result in the run's file; or that of a run, which is written there.

    Raises:
        SystemExit: the file is that of other settings, or the other side's environment is not named or fails.
    """
    file = results / f"{run.name}.json"
    if file.is_file():
        found = read_result(file)
        if (found.hyperparameters, len(found.rewards)) != (run.hyperparameters, run.task.steps):
            raise SystemExit(f"{file} has {len(found.rewards)} steps of {found.hyperparameters}: name other --results")
        return found
    directory = work / run.name
    if run.side == TRL:
        steps, policies = train_classic(run, directory, classic_python)
    else:
        steps, policies = train_plaudit(run, directory)
    held_out = {str(step): judge(policy) for step, policy in policies.items()}
    rewards, kls = ([step[i] for step in steps] for i in range(2))
    result = Result(run.name, run.hyperparameters, rewards, kls, held_out)
    write_result(file, result)
    shutil.rmtree(directory)
    return result


def plaudit_config(run: Run, directory: Path) -> PPOConfig:
    """The PPO stage of a run."""
    task = run.task
    if run.point is not None:
        hyperparameters = PPOSettings(**task.settings(run.point))
    else:
        hyperparameters = dataclasses.replace(task.config.ppo, **run.hyperparameters)
    return dataclasses.replace(
        task.config,
        output_dir=directory,
        steps=task.steps,
        seed=run.seed,
        ppo=hyperparameters,
        trackers=(),
        checkpoint_every=min(task.checkpoints),
        keep_checkpoints=task.steps,
        resume="auto",
    )


def train_plaudit(run: Run, directory: Path) -> tuple[list[tuple[float, float]], dict[int, str]]:
    """Reward and KL of each step, and the policies after the steps of `checkpoints`."""
    ppo.run(plaudit_config(run, directory))
    steps = [(step[REWARD_MEAN], step[KL]) for step in read_metrics(directory / FILE_NAME)]
    policies = {step: policy_at(directory, step, directory / f"policy-{step}") for step in run.task.checkpoints}
    return steps, policies


def train_classic(run: Run, directory: Path, python: str | None) -> tuple[list[tuple[float, float]], dict[int, str]]:
    """The same by trl 0.11.4, from a plan of the same prompts and lengths."""
    if python is None:
        raise SystemExit(f"{run.name} is not there yet: name the environment with trl 0.11.4, --classic-python")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    plan = directory / "plan.json"
    write_text(plan, json.dumps(classic_plan(run)))
    command = [python, str(CLASSIC_PROGRAM), str(plan), "--output-dir", str(directory)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{run.name} failed:\n{done.stderr[-2000:]}")
    steps = json.loads((directory / "steps.json").read_text())
    policies = {step: str(directory / f"step-{step:06d}") for step in run.task.checkpoints}
    return [(step["reward"], step["kl"]) for step in steps], policies


def classic_plan(run: Run) -> dict[str, Any]:
    """What the other side's program reads: the prompts and lengths that Plaudit's run with this seed has."""
    assert run.point is not None
    task, config = run.task, run.task.config
    tokenizer = load_tokenizer(config.policy)
    prompts = load_prompts(config.dataset, config.prompts, tokenizer, "train", seed=run.seed)
    schedule = PromptSchedule(prompts, task.batch_size, seed=run.seed)
    generation = config.generation.answering(config.prompts.kind)
    return {
        "policy": config.policy,
        "judge": task.judge,
        "seed": run.seed,
        "lora": {
            "r": config.lora.r,
            "lora_alpha": config.lora.alpha,
            "lora_dropout": config.lora.dropout,
            "target_modules": config.lora.target_modules,
        },
        "ppo": task.settings(run.point),
        "prompts": [schedule.batch(step).token_ids for step in range(task.steps)],
        "lengths": [
            Draws.of(generation, task.batch_size, seed=run.seed, step=step).lengths.tolist()
            for step in range(task.steps)
        ],
        "generate_batch_size": task.batch_size,
        "checkpoints": task.checkpoints,
    }


def write_result(file: Path, result: Result) -> None:
    """As JSON. Rewards of single prompts have four decimals, which moves no mean by more than 0.00005."""
    plain = dataclasses.asdict(result)
    for judged in plain["held_out"].values():
        judged["rewards"] = [round(reward, 4) for reward in judged["rewards"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(plain, allow_nan=False) + "\n")


def read_result(file: Path) -> Result:
    """What `write_result` wrote."""
    found = json.loads(file.read_text(encoding="utf-8"))
    held_out = {step: Judged(**judged) for step, judged in found.pop("held_out").items()}
    return Result(**found, held_out=held_out)
