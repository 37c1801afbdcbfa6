"""Are two rounds of ranking better than one, at equal numbers of rankings and equal KL?

    OMP_NUM_THREADS=1 python -m benchmarks.ranking.loop_experiment

Protocol. Simulated people (Plackett-Luce noise at temperature 0.2) rank answers of the embedded language model; their
hidden judge is the embedded classifier. One arm asks about all prompts at once. The other asks about half of them,
trains, and asks about the other half with the new policy's answers. Both arms are `plaudit loop` with the preset
`loop`. For each seed:

1. Both arms run, 20 PPO steps in each round, even where a reward model can't be told from chance. The loop's own
   comparisons are made on two prompts each, and nobody looks at them.
2. Of each arm's last PPO checkpoints, the pair with the greatest KL is chosen whose KL differ by at most 10 %. A
   checkpoint's KL is the mean over the five steps of training before it. The choice is written to `chosen.json`.
3. Only then do stage 1 and both chosen policies answer the held-out prompts, the same ones for every seed, from the
   same random numbers, and the judge scores them without noise. A tie counts 1/2; intervals are by bootstrap over
   prompts, pooled over seeds within each prompt first.
4. To explain the result, not to decide it: stage 1 and both chosen policies write four answers each to prompts that
   nobody ranked, and each arm's reward model orders them. Its accuracy is the share of pairs of one policy's answers
   that it orders as the judge does without noise.

Claimed is an advantage of two rounds if each seed's lower bound is above 0.5 and the pooled win rate is at least 0.57.

Writes `seed-N.json` for each run and prints Markdown tables. Whatever was interrupted goes on with the same command.
Seeds are independent: run them in processes of their own (`--seeds 0`, `--seeds 1`, ...), then all for the tables.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.ranking.reward_model_accuracy import accuracies
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.saving import save_policy
from plaudit.report.evaluation import mean_ci95
from plaudit.rewards.settings import RewardSettings
from plaudit.run.checkpoint import WEIGHTS, list_checkpoints
from plaudit.run.metrics import FILE_NAME, KL, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.run.storage import write_text
from plaudit.settings import files as presets
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.loop import LoopConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import evaluate, loop
from plaudit.stages.ppo_results import CONFIG_FILE

ARMS = {"one round": 1, "two rounds": 2}
LARGEST_DIFFERENCE = 0.1
SMOOTHED_STEPS = 5
CLAIMED = 0.57
READY_TIMEOUT_S = 1200.0
"""Of the services; the machine may be busy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=1536, help="ranked prompts of each arm, over all its rounds")
    parser.add_argument("--held-out", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="PPO steps of each round")
    parser.add_argument("--every", type=int, default=1, help="PPO steps between checkpoints")
    parser.add_argument("--preset", type=Path, default=Path("presets/loop.yaml"))
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
        name: policy_at(Path(records[name]["policy"]), step, directory / name.replace(" ", "-") / f"step-{step}")
        for name, step in chosen.items()
    }
    with reward_service(config.judge, directory, ready_timeout_s=READY_TIMEOUT_S, name="judge") as url:
        judge = RewardSettings.of(url=(url,), label=config.judge_label)
        evaluated = {
            name: evaluate_policy(arguments, config, judge, policy, directory / name.replace(" ", "-") / "judged")
            for name, policy in policies.items()
        }
    scores = {name: [sample.reward_after for sample in result.samples] for name, result in evaluated.items()}
    scores["stage 1"] = [sample.reward_before for sample in evaluated["one round"].samples]
    reward_models = {name: Path(record["policy"]).parent / "reward-model" for name, record in records.items()}
    return {
        "seed": seed,
        "chosen_steps": chosen,
        "kl": {name: curves[name][step] for name, step in chosen.items()},
        "rankings": {name: record["all_rankings"] for name, record in records.items()},
        "held_out_accuracy": {name: record["held_out_accuracy"] for name, record in records.items()},
        "judge": {name: statistics.fmean(own) for name, own in scores.items()},
        "held_out_kl": {name: result.evaluation.kl for name, result in evaluated.items()},
        "compared": {
            f"{after} against {before}": compared(scores[after], scores[before])
            for after, before in (("two rounds", "one round"), ("one round", "stage 1"), ("two rounds", "stage 1"))
        },
        "reward_model_accuracy": accuracies(
            config, reward_models, {"stage 1": config.policy, **policies}, directory, skip=arguments.prompts
        ),
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
        reward_model=dataclasses.replace(config.reward_model, allow_chance=True),
        steps=arguments.steps,
        checkpoint_every=arguments.every,
        keep_checkpoints=arguments.steps,
        n_prompts=2,
        ready_timeout_s=READY_TIMEOUT_S,
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


def policy_at(run: Path, step: int, directory: Path) -> str:
    """Writes the run's policy as it was after so many steps, from that checkpoint, unless it is there; where it is."""
    if (directory / "tokenizer_config.json").is_file():  # written last
        return str(directory)
    settings = presets.from_dict(PPOConfig, json.loads((run / CONFIG_FILE).read_text()), run / CONFIG_FILE)
    policy = load_policy(settings.policy, settings.lora, settings.model)
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(run / "checkpoints" / f"step-{step:06d}" / WEIGHTS).items():
            parameters[name].copy_(tensor)
    directory.mkdir(parents=True, exist_ok=True)
    save_policy(policy, directory)
    load_tokenizer(settings.policy).save_pretrained(directory)
    return str(directory)


def evaluate_policy(
    arguments: argparse.Namespace, config: LoopConfig, judge: RewardSettings, policy: str, directory: Path
) -> evaluate.EvaluationResult:
    """The policy and stage 1 on the held-out prompts, which are the same for all seeds."""
    return evaluate.by_rewards(
        EvaluateConfig(
            policy=config.policy,
            after=policy,
            output_dir=directory,
            dataset=config.dataset,
            prompts=config.prompts,
            generation=config.generation,
            reward=judge,
            n_prompts=arguments.held_out,
            seed=0,
        )
    )


def compared(after: Sequence[float], before: Sequence[float]) -> dict[str, Any]:
    """The win rate of one policy's scores over another's, prompt by prompt."""
    wins = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(after, before, strict=True)]
    return {"win_rate": statistics.fmean(wins), "ci95": mean_ci95(wins), "wins": wins}


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
    print("\nMean score of the judge, and the share of pairs that each arm's reward model orders as the judge does:\n")
    print("| seed | answers of | judge | KL | one round's reward model | two rounds' reward model |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for seed, result in results.items():
        for policy in ("stage 1", *ARMS):
            kl = result["held_out_kl"].get(policy, 0.0)
            accuracy = " | ".join(f"{result['reward_model_accuracy'][arm][policy]:.3f}" for arm in ARMS)
            print(f"| {seed} | {policy} | {result['judge'][policy]:.2f} | {kl:.2f} | {accuracy} |")


if __name__ == "__main__":
    main()
