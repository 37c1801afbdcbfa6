"""Are two rounds of ranking better than one, at equal numbers of rankings and equal KL?

    OMP_NUM_THREADS=1 python -m benchmarks.ranking.loop_experiment

Protocol. Simulated people (Plackett-Luce noise at temperature 0.2) rank answers of the embedded language model; their
hidden judge is the embedded classifier. One arm asks about all prompts at once. The other asks about half of them,
trains, and asks about the other half with the new policy's answers. Both arms are `plaudit loop` with the preset
`loop`. For each seed:

1. Both arms run. The loop's own comparisons are made on two prompts each, and nobody looks at them.
2. Of each arm's last PPO checkpoints, the pair with the greatest KL is chosen whose KL differ by at most 10 %. A
   checkpoint's KL is the mean over the five steps of training before it. The choice is written to `chosen.json`.
3. Only then do both chosen policies answer the held-out prompts, the same ones for every seed, from the same random
   numbers, and the judge scores them without noise. A tie counts 1/2; intervals are by bootstrap over prompts, pooled
   over seeds within each prompt first.

Claimed is an advantage of two rounds if each seed's lower bound is above 0.5 and the pooled win rate is at least 0.57.

Writes `seed-N.json` for each run and prints a Markdown table. Whatever was interrupted goes on with the same command.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plaudit.report.evaluation import mean_ci95
from plaudit.rewards.settings import RewardSettings
from plaudit.run.checkpoint import list_checkpoints
from plaudit.run.metrics import FILE_NAME, KL, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.run.storage import write_text
from plaudit.settings import files as presets
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.loop import LoopConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import evaluate, loop, ppo
from plaudit.stages.ppo_results import CONFIG_FILE

ARMS = {"one round": 1, "two rounds": 2}
LARGEST_DIFFERENCE = 0.1
SMOOTHED_STEPS = 5
CLAIMED = 0.57


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=1536, help="ranked prompts of each arm, over all its rounds")
    parser.add_argument("--held-out", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30, help="PPO steps of each round")
    parser.add_argument("--every", type=int, default=5, help="PPO steps between checkpoints")
    parser.add_argument("--preset", type=Path, default=Path("presets/loop.yaml"))
    parser.add_argument("--allow-chance", action="store_true", help="for a trial with few rankings")
    parser.add_argument("--runs", type=Path, default=Path("runs/loop-experiment"))
    arguments = parser.parse_args()

    results = {}
    for seed in arguments.seeds:
        file = arguments.runs / f"seed-{seed}.json"
        if not file.is_file():
            write_text(file, json.dumps(run_seed(arguments, seed), indent=2, allow_nan=False) + "\n")
        results[seed] = json.loads(file.read_text(encoding="utf-8"))
    print_table(results)


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Both arms of one seed, and how their chosen policies compare."""
    directory = arguments.runs / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    arms = {name: arm(arguments, seed, name, directory) for name in ARMS}
    records = {name: loop.run(config)[-1] for name, config in arms.items()}
    curves = {name: kl_by_checkpoint(Path(record["policy"])) for name, record in records.items()}
    one, two = choose(curves["one round"], curves["two rounds"])
    chosen = {"one round": one, "two rounds": two}
    write_text(directory / "chosen.json", json.dumps({"chosen": chosen, "kl": curves}, indent=2) + "\n")

    config = arms["two rounds"]
    assert config.judge is not None
    policies = {
        name: policy_at(arms[name], Path(records[name]["policy"]), step, directory / name.replace(" ", "-"))
        for name, step in chosen.items()
    }
    with reward_service(config.judge, directory, ready_timeout_s=300.0, name="judge") as url:
        judge = RewardSettings.of(url=(url,), label=config.judge_label)
        pairs = {
            "two rounds against one round": (policies["two rounds"], policies["one round"]),
            "one round against stage 1": (policies["one round"], config.policy),
            "two rounds against stage 1": (policies["two rounds"], config.policy),
        }
        compared = {name: compare(arguments, config, judge, *pair, directory / name) for name, pair in pairs.items()}
    return {
        "seed": seed,
        "chosen_steps": chosen,
        "kl": {name: curves[name][step] for name, step in chosen.items()},
        "rankings": {name: record["all_rankings"] for name, record in records.items()},
        "held_out_accuracy": {name: record["held_out_accuracy"] for name, record in records.items()},
        "compared": compared,
        "command": f"python -m benchmarks.ranking.loop_experiment --seeds {seed} --prompts {arguments.prompts} "
        f"--held-out {arguments.held_out} --steps {arguments.steps} --every {arguments.every}",
    }


def arm(arguments: argparse.Namespace, seed: int, name: str, directory: Path) -> LoopConfig:
    """The loop of one arm."""
    config = presets.load(LoopConfig, arguments.preset)
    rounds = ARMS[name]
    return dataclasses.replace(
        config,
        rounds=rounds,
        output_dir=directory / name.replace(" ", "-") / "loop",
        resume="auto",
        sample=dataclasses.replace(config.sample, n=arguments.prompts // rounds),
        reward_model=dataclasses.replace(config.reward_model, allow_chance=arguments.allow_chance),
        steps=arguments.steps,
        checkpoint_every=arguments.every,
        keep_checkpoints=arguments.steps,
        n_prompts=2,
        seed=seed,
    )


def kl_by_checkpoint(directory: Path) -> dict[int, float]:
    """Of each checkpoint of a run, by its step: the mean KL of the steps before it."""
    curve = [record[KL] for record in read_metrics(directory / FILE_NAME)]
    steps = [checkpoint.step for checkpoint in list_checkpoints(directory / "checkpoints")]
    return {step: statistics.fmean(curve[max(0, step - SMOOTHED_STEPS) : step]) for step in steps}


def choose(one: Mapping[int, float], two: Mapping[int, float]) -> tuple[int, int]:
    """The steps of the pair with the greatest smaller KL among those that differ by at most 10 % of the larger one.

    Raises:
        ValueError: no pair is that close.
    """
    close = [
        (min(a, b), step, other)
        for step, a in one.items()
        for other, b in two.items()
        if abs(a - b) <= LARGEST_DIFFERENCE * max(a, b)
    ]
    if not close:
        raise ValueError(f"no two checkpoints have a KL within {LARGEST_DIFFERENCE:.0%}: {dict(one)} and {dict(two)}")
    _, step, other = max(close)
    return step, other


def policy_at(config: LoopConfig, run: Path, step: int, directory: Path) -> str:
    """The run's policy as it was after so many steps: resumed from that checkpoint with no step left to take."""
    settings = presets.from_dict(PPOConfig, json.loads((run / CONFIG_FILE).read_text()), run / CONFIG_FILE)
    output_dir = directory / f"step-{step}"
    output_dir.mkdir(parents=True, exist_ok=True)
    taken = [json.dumps(record) + "\n" for record in read_metrics(run / FILE_NAME)[:step]]
    write_text(output_dir / FILE_NAME, "".join(taken))
    with reward_service(
        str(run.parent / "reward-model"), directory, ready_timeout_s=300.0, device=config.device
    ) as url:
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        resumed = dataclasses.replace(
            settings, reward=config.reward_from(url), resume=str(checkpoint), steps=step, output_dir=output_dir
        )
        ppo.run(resumed)
    return str(output_dir)


def compare(
    arguments: argparse.Namespace, config: LoopConfig, judge: RewardSettings, after: str, before: str, directory: Path
) -> dict[str, Any]:
    """`after` against `before` on the held-out prompts, which are the same for all seeds."""
    result = evaluate.by_rewards(
        EvaluateConfig(
            policy=before,
            after=after,
            output_dir=directory,
            dataset=config.dataset,
            prompts=config.prompts,
            generation=config.generation,
            reward=judge,
            n_prompts=arguments.held_out,
            seed=0,
        )
    )
    wins = [0.5 + 0.5 * ((sample.change > 0) - (sample.change < 0)) for sample in result.samples]
    return {
        "win_rate": statistics.fmean(wins),
        "ci95": mean_ci95(wins),
        "judge_before": result.evaluation.reward.before.mean,
        "judge_after": result.evaluation.reward.after.mean,
        "kl_to_before": result.evaluation.kl,
        "wins": wins,
    }


def pooled(wins: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """The win rate over seeds and its interval: each prompt's mean over the seeds first, then prompts are drawn."""
    means = [statistics.fmean(of_prompt) for of_prompt in zip(*wins, strict=True)]
    return statistics.fmean(means), mean_ci95(means)


def print_table(results: Mapping[int, Mapping[str, Any]]) -> None:
    name = "two rounds against one round"
    print(
        "| seed | rankings | held-out pairs | KL, one round | KL, two rounds | win rate of two rounds | 95 % interval |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | --- |")
    for seed, result in results.items():
        rankings, accuracy, kl = (result[key] for key in ("rankings", "held_out_accuracy", "kl"))
        compared = result["compared"][name]
        print(
            f"| {seed} | {rankings['one round']}, {rankings['two rounds']} | {accuracy['one round']:.3f}, "
            f"{accuracy['two rounds']:.3f} | {kl['one round']:.2f} | {kl['two rounds']:.2f} | "
            f"{compared['win_rate']:.3f} | {compared['ci95'][0]:.3f} to {compared['ci95'][1]:.3f} |"
        )
    mean, (low, high) = pooled([result["compared"][name]["wins"] for result in results.values()])
    print(f"| all | | | | | {mean:.3f} | {low:.3f} to {high:.3f} |")
    each = all(result["compared"][name]["ci95"][0] > 0.5 for result in results.values())
    claim = "holds" if each and mean >= CLAIMED else "does not hold"
    print(f"\nThe claim (each lower bound above 0.5, pooled at least {CLAIMED}) {claim}.")


if __name__ == "__main__":
    main()
