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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.settings import DEFAULT, result_of, table
from benchmarks.tables import measured_on, put
from plaudit.data.sources import load_labelled_texts
from plaudit.run.service_process import reward_service
from plaudit.run.storage import write_text
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.supervised import OptimizerSettings
from plaudit.stages import reward_model

WARM_UP = {"value_warmup_steps": 4}
CRITICS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    DEFAULT: ({}, False),
    "warm-up": (WARM_UP, False),
    "decoder judge": ({}, True),
    "decoder judge and warm-up": (WARM_UP, True),
}
"""Of each setting what it changes in `ppo`, and whether the critic is the judge."""
PAIRS = 6000
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
    arguments.runs.mkdir(parents=True, exist_ok=True)
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
                changes = {
                    "value_warmup_steps": changed.ppo.value_warmup_steps,
                    "value_model": changed.model.value_model,
                }
                results.append(result_of(changed, name, changes))
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
            optimizer=OptimizerSettings(learning_rate=2e-3, batch_size=16, epochs=2),
        )
    )
    return directory


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
