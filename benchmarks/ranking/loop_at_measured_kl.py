"""The experiment with rounds once more, at a KL that is measured at the checkpoint itself.

    OMP_NUM_THREADS=1 python -m benchmarks.ranking.loop_at_measured_kl

`loop_experiment` takes the mean over the five steps before a checkpoint for its KL. A KL that rises is higher at the
checkpoint, and in the second round it rose faster: on the held-out prompts the policies of two rounds had a higher KL
than those of one. So this comparison was decided on after that result, before any of its own win rates: the arm with
one round keeps its chosen policy. Of two rounds, the last checkpoint is taken whose KL, the mean over two steps before
and two after it, is at most what the other policy has on the held-out prompts. Nothing but KL enters the choice.

Needs the finished runs of `loop_experiment`. Writes `seed-N-measured-kl.json` and prints a Markdown table.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ranking.loop_experiment import READY_TIMEOUT_S, arm, compared, evaluate_policy, policy_at, pooled
from plaudit.rewards.settings import RewardSettings
from plaudit.run.loop_state import ROUNDS_FILE
from plaudit.run.metrics import FILE_NAME, KL, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.run.storage import write_text

AROUND = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=1536)
    parser.add_argument("--held-out", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--preset", type=Path, default=Path("presets/loop.yaml"))
    parser.add_argument("--runs", type=Path, default=Path("runs/loop-experiment"))
    arguments = parser.parse_args()
    print("| seed | KL, one round | KL, two rounds | judge, one round | two rounds | win rate of two rounds | 95 % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    wins = []
    for seed in arguments.seeds:
        file = arguments.runs / f"seed-{seed}-measured-kl.json"
        if not file.is_file():
            write_text(file, json.dumps(run_seed(arguments, seed), indent=2, allow_nan=False) + "\n")
        result = json.loads(file.read_text(encoding="utf-8"))
        kl, judge, (low, high) = result["held_out_kl"], result["judge"], result["compared"]["ci95"]
        print(
            f"| {seed} | {kl['one round']:.2f} | {kl['two rounds']:.2f} | {judge['one round']:.2f} | "
            f"{judge['two rounds']:.2f} | {result['compared']['win_rate']:.3f} | {low:.3f} to {high:.3f} |"
        )
        wins.append(result["compared"]["wins"])
    mean, (low, high) = pooled(wins)
    print(f"| all | | | | | {mean:.3f} | {low:.3f} to {high:.3f} |")


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The chosen policy of one round against the last one of two rounds whose KL is at most its own."""
    first = json.loads((arguments.runs / f"seed-{seed}.json").read_text(encoding="utf-8"))
    directory = arguments.runs / f"seed-{seed}"
    config = arm(arguments, seed, "two rounds", directory)
    assert config.judge is not None
    *_, last_round = (config.output_dir / ROUNDS_FILE).read_text(encoding="utf-8").splitlines()
    run = Path(json.loads(last_round)["policy"])
    limit = first["held_out_kl"]["one round"]
    step = last_at_most(limit, [record[KL] for record in read_metrics(run / FILE_NAME)])
    policy = policy_at(run, step, directory / "two-rounds" / f"step-{step}")
    with reward_service(config.judge, directory, ready_timeout_s=READY_TIMEOUT_S, name="judge") as url:
        judge = RewardSettings.of(url=(url,), label=config.judge_label)
        result = evaluate_policy(arguments, config, judge, policy, directory / "two-rounds" / "judged-at-measured-kl")
    one = scores(directory / "one-round" / "judged" / "samples.csv")
    two = [sample.reward_after for sample in result.samples]
    return {
        "seed": seed,
        "chosen_steps": {"one round": first["chosen_steps"]["one round"], "two rounds": step},
        "held_out_kl": {"one round": limit, "two rounds": result.evaluation.kl},
        "judge": {"one round": statistics.fmean(one), "two rounds": statistics.fmean(two)},
        "compared": compared(two, one),
    }


def last_at_most(limit: float, curve: Sequence[float]) -> int:
    """The last step whose KL is at most `limit`: the checkpoint after step s is what step s samples from.

    `curve` is the KL of each step's rollout. Steps without two others on both sides are left out.
    """
    steps = range(AROUND, len(curve) - AROUND)
    smooth = {step: statistics.fmean(curve[step - AROUND : step + AROUND + 1]) for step in steps}
    return max(step for step, kl in smooth.items() if kl <= limit)


def scores(file: Path) -> list[float]:
    """The judge's scores of an evaluated policy, in the order of the held-out prompts."""
    with file.open(encoding="utf-8", newline="") as opened:
        return [float(row["reward_after"]) for row in csv.DictReader(opened)]


if __name__ == "__main__":
    main()
