"""What PPO on the embedded models learns: reward and KL against samples, for several seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.curves

Each seed is the PPO stage of a preset, as `plaudit ppo` runs it, against one reward service on this machine. Prints a
Markdown table and draws the picture. A run that has been started in `--runs` goes on from its checkpoint.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from plaudit.run.metrics import FILE_NAME, KL, REWARD_MEAN, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import ppo

Curve = list[dict[str, float]]
COLOURS = ("#1f6feb", "#b3541e", "#2e8b57", "#8250df", "#8a94a3")
LAST_STEPS = 5
"""What the table calls the end: a single step's mean has the noise of its samples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", type=Path, default=Path("presets/demo.yaml"))
    parser.add_argument("--reward-model", default="models/imdb-distilbert-mini")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning-curves"))
    parser.add_argument("--image", type=Path, default=Path("docs/images/learning-curves.png"))
    arguments = parser.parse_args()

    config = presets.load(PPOConfig, arguments.preset)
    with reward_service(arguments.reward_model, arguments.runs, ready_timeout_s=300.0) as url:
        config = dataclasses.replace(config, resume="auto", reward=config.reward.asking(url))
        curves = {seed: curve_of(config, seed, arguments.runs / f"seed-{seed}") for seed in arguments.seeds}
    assert config.ppo.batch_size is not None
    print_table(curves, config.ppo.batch_size)
    draw(curves, config.ppo.batch_size).savefig(arguments.image, dpi=120)


def curve_of(config: PPOConfig, seed: int, directory: Path) -> Curve:
    """The metrics of a whole run."""
    ppo.run(dataclasses.replace(config, seed=seed, output_dir=directory))
    return read_metrics(directory / FILE_NAME)


def print_table(curves: dict[int, Curve], samples_per_step: int) -> None:
    print(f"| seed | samples | reward, first step | reward, last {LAST_STEPS} steps | KL, last {LAST_STEPS} steps |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for seed, curve in curves.items():
        print(
            f"| {seed} | {len(curve) * samples_per_step:,} | {curve[0][REWARD_MEAN]:+.2f} | "
            f"{at_the_end(curve, REWARD_MEAN):+.2f} | {at_the_end(curve, KL):.2f} |"
        )


def at_the_end(curve: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(step[name] for step in curve[-LAST_STEPS:])


def draw(curves: dict[int, Curve], samples_per_step: int) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), (REWARD_MEAN, KL), ("reward, mean of a step", "KL to the reference, nats"), strict=True
    ):
        for (seed, curve), colour in zip(curves.items(), COLOURS, strict=False):
            samples = [(step["step"] + 1) * samples_per_step for step in curve]
            axes.plot(samples, [step[name] for step in curve], color=colour, linewidth=1.6, label=f"seed {seed}")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("samples")
        axes.set_xlim(left=0)
        axes.grid(color="#e3e7ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
