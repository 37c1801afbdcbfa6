"""Each setting of the algorithm beside the default: reward and KL at the end of runs on the embedded models.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.settings --steps 12 --into docs/evidence/ppo.md

A run is the PPO stage of a preset with some settings changed, against one reward service on this machine. It leaves one
JSON file in `--runs`; a run whose file is there is not taken again. Prints a Markdown table, which `--into` puts into a
document. The intervals are those of the mean over seeds (Student's t), and of the mean difference from the default with
the same seed.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.learning.analysis import over_seeds
from benchmarks.tables import measured_on, put
from plaudit.run.metrics import FILE_NAME, KL, REWARD_COMPONENT, REWARD_MEAN, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.run.storage import write_text
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import ppo

DEFAULT = "default"
GROUPS = {"responses_per_prompt": 4}
KL_IN_THE_LOSS = {"init_kl_coef": 0.0, "kl_loss_coef": 0.06}
"""The coefficient that the demo has in the reward."""
OF_PPO: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "clip-higher": {"cliprange_upper": 0.28},
    "dual-clip": {"dual_clip": 3.0},
    "sequence-mean": {"loss_aggregation": "sequence_mean"},
    "sequence-sum": {"loss_aggregation": "sequence_sum", "loss_tokens": 16},
    "value-lambda-1": {"value_lam": 1.0},
    "length-adaptive-lambda": {"lam_alpha": 1.0, "value_lam": 1.0},
    "kl-loss-k1": KL_IN_THE_LOSS | {"kl_loss": "k1"},
    "kl-loss-k2": KL_IN_THE_LOSS | {"kl_loss": "k2"},
    "kl-loss-k3": KL_IN_THE_LOSS | {"kl_loss": "k3"},
    "groups-of-4": GROUPS,
    "rloo": GROUPS | {"advantage_estimator": "rloo"},
    "grpo": GROUPS | {"advantage_estimator": "grpo", "loss_aggregation": "sequence_mean"},
    "dr-grpo": GROUPS | {"advantage_estimator": "dr_grpo", "loss_aggregation": "sequence_sum", "loss_tokens": 16},
}
"""What each setting changes in `ppo`."""
OF_REWARD: Mapping[str, Mapping[str, Any]] = {
    "two-judges-minimum": {"combination": "minimum"},
    "two-judges-mean-minus-std": {"combination": "mean_minus_std"},
}
"""What each setting changes in `reward`. The judges are the two logits of the embedded classifier, the negative one
with weight -1."""
NAMES = (*OF_PPO, *OF_REWARD)
LIGHT, DARK = "#8ab4f8", "#1f2328"
LAST_STEPS = 5
"""What the table calls the end: a single step's mean has the noise of its samples."""


@dataclass(frozen=True)
class Result:
    """The end of one run."""

    setting: str
    seed: int
    steps: int
    changes: Mapping[str, Any]
    reward: float
    kl: float
    cpu_s: float
    """Processor time of the trainer, without the reward service."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12, help="PPO steps of a run")
    parser.add_argument("--preset", type=Path, default=Path("presets/demo.yaml"))
    parser.add_argument("--reward-model", default="models/imdb-distilbert-mini")
    parser.add_argument("--runs", type=Path, default=Path("runs/settings"))
    parser.add_argument("--into", type=Path, help="document whose table of this benchmark is replaced")
    parser.add_argument("--image", type=Path, help="picture of the differences from the default to write")
    arguments = parser.parse_args()

    names = list(dict.fromkeys((DEFAULT, *arguments.settings)))
    config = dataclasses.replace(presets.load(PPOConfig, arguments.preset), steps=arguments.steps, trackers=())
    with reward_service(arguments.reward_model, arguments.runs, ready_timeout_s=300.0) as url:
        # Seed by seed, so that an interrupted benchmark has something of every setting.
        results = [
            result_of(
                dataclasses.replace(
                    changed(config, name, url), seed=seed, output_dir=arguments.runs / f"{name}-seed-{seed}"
                ),
                name,
                {**OF_PPO.get(name, {}), **OF_REWARD.get(name, {})},
                # Of several judges, the one that all settings have in common.
                REWARD_COMPONENT.format(name="positive", statistic="mean") if name in OF_REWARD else REWARD_MEAN,
            )
            for seed in arguments.seeds
            for name in names
        ]
    lines = table(results, names)
    print("\n".join(lines))
    if arguments.into is not None:
        samples, count = arguments.steps * config.ppo.batch_size, len(arguments.seeds)
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        head = [f"{measured_on('torch', 'transformers')}; {samples:,} samples a run, {seeds}", ""]
        put(arguments.into, "settings", [*head, *lines])
    if arguments.image is not None:
        draw(results, names).savefig(arguments.image, dpi=120)


def changed(config: PPOConfig, name: str, url: str) -> PPOConfig:
    """The config with this setting, whose first reward is asked at `url`."""
    reward = config.reward.asking(url)
    positive = dataclasses.replace(reward.components[0], name="positive", label="POSITIVE")
    judges = [positive]
    if name in OF_REWARD:
        judges.append(dataclasses.replace(positive, name="not-negative", label="NEGATIVE", weight=-1.0))
    return dataclasses.replace(
        config,
        ppo=dataclasses.replace(config.ppo, **OF_PPO.get(name, {})),
        reward=dataclasses.replace(reward, components=tuple(judges), **OF_REWARD.get(name, {})),
    )


def result_of(config: PPOConfig, name: str, changes: Mapping[str, Any], reward: str = REWARD_MEAN) -> Result:
    """The result in the file beside the run's directory, or that of a run, which is then written there. `reward` is
    the metric that is compared.

    Raises:
        SystemExit: the file is that of other settings.
    """
    directory = config.output_dir
    file = directory.with_name(f"{directory.name}.json")
    if file.is_file():
        found = Result(**json.loads(file.read_text(encoding="utf-8")))
        if (found.steps, found.changes) != (config.steps, changes):
            raise SystemExit(f"{file} has {found.steps} steps of {found.changes}: remove it, or name other --runs")
        return found
    shutil.rmtree(directory, ignore_errors=True)
    began = time.process_time()
    ppo.run(config)
    cpu_s = time.process_time() - began
    metrics = read_metrics(directory / FILE_NAME)
    ends = at_the_end(metrics, reward), at_the_end(metrics, KL)
    assert config.steps is not None
    result = Result(name, config.seed, config.steps, changes, *ends, cpu_s)
    write_text(file, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    shutil.rmtree(directory)
    return result


def at_the_end(metrics: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(step[name] for step in metrics[-LAST_STEPS:])


def table(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """One row for each setting, in Markdown."""
    by_setting = {name: {result.seed: result for result in results if result.setting == name} for name in names}
    rows = [
        f"| setting | reward, last {LAST_STEPS} steps | KL, last {LAST_STEPS} steps "
        "| reward, difference from the default | KL, difference | trainer, CPU s a run |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for name, of_seeds in by_setting.items():
        pairs = [(result, by_setting[DEFAULT][seed]) for seed, result in of_seeds.items()]
        figures = [
            interval([result.reward for result, _ in pairs], "{:+.2f}"),
            interval([result.kl for result, _ in pairs], "{:.2f}"),
            *(
                ("", "")
                if name == DEFAULT
                else (
                    interval([result.reward - default.reward for result, default in pairs], "{:+.2f}"),
                    interval([result.kl - default.kl for result, default in pairs], "{:+.2f}"),
                )
            ),
            f"{statistics.fmean(result.cpu_s for result, _ in pairs):.0f}",
        ]
        rows.append(f"| {name} | {' | '.join(figures)} |")
    return rows


def draw(results: Sequence[Result], names: Sequence[str]) -> Figure:
    """Each setting's differences from the default, seed by seed, with their means."""
    of_default = {result.seed: result for result in results if result.setting == DEFAULT}
    shown = [name for name in names if name != DEFAULT]
    figure = Figure(figsize=(10, 1 + 0.26 * len(shown)), layout="constrained")
    all_axes = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in zip(
        all_axes, ("reward", "kl"), ("reward, difference from the default", "KL, difference, nats"), strict=True
    ):
        for row, name in enumerate(shown):
            differences = [
                getattr(result, measure) - getattr(of_default[result.seed], measure)
                for result in results
                if result.setting == name
            ]
            axes.plot(differences, [row] * len(differences), "o", color=LIGHT, markersize=5)
            axes.plot(statistics.fmean(differences), row, "|", color=DARK, markersize=12, markeredgewidth=2.5)
        axes.axvline(0, color=DARK, linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="x", color="#e3e7ec", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    all_axes[0].set_yticks(range(len(shown)), shown)
    all_axes[0].invert_yaxis()
    return figure


def interval(values: Sequence[float], form: str) -> str:
    """The mean and its 95 % interval, by Student's t; the mean alone of a single value."""
    over = over_seeds(values)
    if len(values) == 1:
        return form.format(over.mean)
    return f"{form.format(over.mean)} ({form.format(over.low)} to {form.format(over.high)})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
