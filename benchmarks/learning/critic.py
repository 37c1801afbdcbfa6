"""What the critic changes: reward at equal samples with and without warm-up, and with a decoder judge as the critic.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.critic --steps 16 --into docs/evidence/ppo.md

A run is the PPO stage of a preset against one reward service on this machine. The decoder judge is the embedded policy,
trained in `--runs` to tell openings of good reviews from openings of bad ones. Steps that train the critic alone count
as steps. Each run leaves one JSON file in `--runs`; a run whose file is there is not taken again. Prints a table like
that of `benchmarks.learning.settings`.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.settings import DEFAULT, Result, at_the_end, table
from benchmarks.tables import measured_on, put
from plaudit.data.sources import load_labelled_texts
from plaudit.run.metrics import FILE_NAME, KL, REWARD_MEAN, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.run.storage import write_text
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.supervised import OptimizerSettings
from plaudit.stages import ppo, reward_model

WARM_UP = {"value_warmup_steps": 4}
CRITICS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    DEFAULT: ({}, False),
    "warm-up": (WARM_UP, False),
    "decoder judge": ({}, True),
    "decoder judge and warm-up": (WARM_UP, True),
}
"""Of each setting what it changes in `ppo`, and whether the critic is the judge."""
PAIRS = 2000
WORDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=16, help="PPO steps of a run")
    parser.add_argument("--preset", type=Path, default=Path("presets/demo.yaml"))
    parser.add_argument("--reward-model", default="models/imdb-distilbert-mini")
    parser.add_argument("--runs", type=Path, default=Path("runs/critic"))
    parser.add_argument("--into", type=Path, help="document whose table of this benchmark is replaced")
    arguments = parser.parse_args()

    config = dataclasses.replace(presets.load(PPOConfig, arguments.preset), steps=arguments.steps, trackers=())
    judge = decoder_judge(config, arguments.runs)
    results = []
    with reward_service(arguments.reward_model, arguments.runs, ready_timeout_s=300.0) as url:
        # Seed by seed, so that an interrupted benchmark has something of every setting.
        for seed in arguments.seeds:
            for name, (of_ppo, judged) in CRITICS.items():
                changed = dataclasses.replace(
                    config,
                    seed=seed,
                    ppo=dataclasses.replace(config.ppo, **of_ppo),
                    model=dataclasses.replace(config.model, value_model=str(judge) if judged else "shared"),
                    reward=config.reward.asking(url),
                    output_dir=arguments.runs / f"{name.replace(' ', '-')}-seed-{seed}",
                )
                results.append(result_of(changed, name))
    lines = table(results, list(CRITICS))
    print("\n".join(lines))
    if arguments.into is not None:
        samples, seeds = arguments.steps * config.ppo.batch_size, len(arguments.seeds)
        head = [f"{measured_on('torch', 'transformers')}; {samples:,} samples a run, {seeds} seeds", ""]
        put(arguments.into, "critic", [*head, *lines])


def decoder_judge(config: PPOConfig, runs: Path) -> Path:
    """A reward model made from the policy, with one score; trained unless it is there."""
    directory = runs / "judge"
    if (directory / "config.json").is_file():
        return directory
    labelled = load_labelled_texts(config.dataset, "train")
    openings: dict[int, list[str]] = {0: [], 1: []}
    for text, label in zip(labelled.texts, labelled.labels, strict=True):
        openings[int(label)].append(" ".join(text.split()[:WORDS]))
    pairs = [json.dumps({"chosen": good, "rejected": bad}) for bad, good in zip(openings[0], openings[1], strict=False)]
    write_text(runs / "pairs.jsonl", "\n".join(pairs[:PAIRS]) + "\n")
    reward_model.run(
        RewardModelConfig(
            kind="pairwise",
            model=config.policy,
            ranked=str(runs / "pairs.jsonl"),
            output_dir=directory,
            max_length=96,
            optimizer=OptimizerSettings(learning_rate=3e-4, epochs=1),
        )
    )
    return directory


def result_of(config: PPOConfig, name: str) -> Result:
    """The result beside the run's directory, or that of a run, which is then written there."""
    file = config.output_dir.with_name(f"{config.output_dir.name}.json")
    if file.is_file():
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    assert config.steps is not None
    shutil.rmtree(config.output_dir, ignore_errors=True)
    began = time.process_time()
    ppo.run(config)
    cpu_s = time.process_time() - began
    metrics = read_metrics(config.output_dir / FILE_NAME)
    changes = {"value_warmup_steps": config.ppo.value_warmup_steps, "value_model": config.model.value_model}
    ends = at_the_end(metrics, REWARD_MEAN), at_the_end(metrics, KL)
    result = Result(name, config.seed, config.steps, changes, *ends, cpu_s)
    write_text(file, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    shutil.rmtree(config.output_dir)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
