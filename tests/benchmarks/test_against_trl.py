"""The comparison with trl 0.11.4: its arithmetic on hand-made numbers, what both sides are given, and resuming."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from benchmarks.learning.against_trl import GRIDS, SEEDS, evaluation, task_of, tuned_points
from benchmarks.learning.analysis import Judged, common_kl, over_prompts, over_seeds, rewards_at
from benchmarks.learning.held_out import judge_adapters
from benchmarks.learning.paired_report import Arm, compare, report
from benchmarks.learning.paired_runs import (
    PLAUDIT,
    PRESET,
    TRL,
    Point,
    Result,
    Run,
    classic_plan,
    plaudit_config,
    read_result,
    result_of,
    write_result,
)
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings
from plaudit.stages import evaluate

POINT = Point(0.001, 0.03)
START = Judged(0.0, [0.0, 0.0])


def test_a_seeds_interval_is_paired_by_prompt() -> None:
    interval = over_prompts([1.5, 3.5, -0.5], [1.0, 3.0, -1.0])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_over_seeds_is_students_t() -> None:
    interval = over_seeds([0.0, 1.0, 2.0])
    # Standard deviation 1 and the quantile 4.3027 of two degrees of freedom: 4.3027 / sqrt(3).
    assert (interval.mean, interval.low) == (1.0, pytest.approx(1 - 2.4841, abs=1e-4))
    assert math.isnan(over_seeds([1.0]).low)


def test_rewards_at_a_kl_lie_on_the_line_between_two_policies() -> None:
    curve = [START, Judged(2.0, [1.0, 3.0]), Judged(4.0, [2.0, 7.0])]
    assert rewards_at(curve, 0.5) == [0.25, 0.75]
    assert rewards_at(curve, 2.0) == [1.0, 3.0]
    assert rewards_at(curve, 3.0) == [1.5, 5.0]
    with pytest.raises(ValueError, match=r"no checkpoint reaches a KL of 4.50: \[0.0, 2.0, 4.0\]"):
        rewards_at(curve, 4.5)


def test_a_run_whose_kl_falls_counts_where_it_first_reached_it() -> None:
    curve = [START, Judged(4.0, [4.0, 4.0]), Judged(2.0, [3.0, 3.0])]
    assert rewards_at(curve, 2.0) == [2.0, 2.0]
    assert common_kl(curve, [START, Judged(3.0, [1.0, 1.0])]) == 3.0


def results(scale: float, kl: float, seed: int) -> Result:
    """A run whose reward is `scale` for each nat."""
    judged = {str(step): Judged(kl * step / 20, [scale * kl * step / 20] * 2) for step in (10, 20)}
    return Result(f"{scale}-{seed}", {}, [0.0] * 20, [0.0] * 20, judged)


def test_the_same_reward_for_more_kl_is_equal_at_equal_samples_and_worse_at_equal_kl() -> None:
    arm: Arm = (PLAUDIT, POINT)
    trl: Arm = (TRL, POINT)
    found = {(trl, seed): results(0.2, 4.0, seed) for seed in (0, 1)}
    found |= {(arm, seed): results(0.1, 8.0, seed) for seed in (0, 1)}
    comparison = compare(found, arm, trl, START)
    assert [interval.mean for interval in comparison.equal_samples.values()] == [pytest.approx(0.0)] * 2
    assert comparison.kl == {0: 4.0, 1: 4.0}
    # At 4 nats 0.1 * 4 instead of 0.2 * 4.
    assert [interval.mean for interval in comparison.equal_kl.values()] == [pytest.approx(-0.4)] * 2
    assert (comparison.no_worse, comparison.better) == (True, False)
    turned = compare(found, trl, arm, START)
    assert (turned.no_worse, turned.better) == (True, True)
    assert "No worse at equal samples: holds. Better at equal KL: does not hold." in report(
        found, {TRL: POINT, PLAUDIT: POINT}, START
    )


def test_each_side_gets_the_point_that_is_worth_most_to_it() -> None:
    grid = GRIDS["embedded"]

    def taken(run: Run) -> Result:
        best = grid[0] if run.side == TRL else grid[3]
        # Much reward for very much KL is worth less: 2 - 0.06 * 30.
        judged = Judged(5.0, [0.8]) if run.point == best else Judged(30.0, [2.0])
        return Result(run.name, {}, [], [], {"20": judged})

    assert tuned_points(task_of("embedded", Path("unused")), taken) == {TRL: grid[0], PLAUDIT: grid[3]}


def test_both_sides_get_the_same_settings_prompts_and_lengths(tmp_path: Path) -> None:
    task = dataclasses.replace(task_of("embedded", tmp_path), steps=2)
    plan = classic_plan(Run(task, TRL, POINT, 3))
    config = plaudit_config(Run(task, PLAUDIT, POINT, 3), tmp_path)
    assert {name: getattr(config.ppo, name) for name in plan["ppo"]} == plan["ppo"]
    assert plan["lora"]["target_modules"] == config.lora.target_modules
    assert [len(batch) for batch in plan["prompts"]] == [128, 128]
    assert plan["prompts"][0] != plan["prompts"][1]
    assert {length for batch in plan["lengths"] for length in batch} == set(range(4, 17))
    assert plan["prompts"] != classic_plan(Run(task, TRL, POINT, 4))["prompts"]
    preset = plaudit_config(Run(task, PRESET, None, 3), tmp_path)
    assert (preset.ppo, preset.steps) == (task.config.ppo, 2)


def test_a_run_whose_file_is_there_is_not_taken_again(tmp_path: Path) -> None:
    run = Run(task_of("embedded", tmp_path), TRL, POINT, 0)
    made = Result(run.name, run.hyperparameters, [0.5] * 20, [1.0] * 20, {"20": Judged(1.25, [0.5, 0.25])})

    def result(run: Run) -> Result:
        return result_of(run, tmp_path / "results", tmp_path, classic_python=None, judge=lambda policy: Judged(0.0, []))

    with pytest.raises(SystemExit, match="is not there yet: name the environment with trl"):
        result(run)
    file = tmp_path / "results" / f"{run.name}.json"
    write_result(file, made)
    assert result(run) == made == read_result(file)
    other = dataclasses.replace(run, task=dataclasses.replace(run.task, steps=4))
    with pytest.raises(SystemExit, match=r"seed-0\.json has 20 steps of .*: name other --results"):
        result(other)


def test_the_published_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    results, task = Path("benchmarks/learning/results/embedded"), task_of("embedded", tmp_path)

    def taken(run: Run) -> Result:
        return result_of(run, results, tmp_path, classic_python=None, judge=lambda policy: Judged(0.0, []))

    points = tuned_points(task, taken)
    runs = [
        *(Run(task, side, points[side], seed) for seed in SEEDS["embedded"] for side in (TRL, PLAUDIT)),
        *(Run(task, PRESET, None, seed) for seed in SEEDS["embedded"]),
    ]
    found = {((run.side, run.point), run.seed): read_result(results / f"{run.name}.json") for run in runs}
    lines = report(found, points, read_result(results / "before-training.json").held_out["0"])
    assert "\n".join(lines) in Path("docs/evidence/learning.md").read_text()


@pytest.mark.slow
def test_a_run_of_plaudit_is_judged_as_evaluate_judges_it_and_leaves_one_file(tmp_path: Path) -> None:
    task = task_of("embedded", tmp_path)
    rewards = RewardSettings.of(function="harness.judges:vowels")
    task = dataclasses.replace(
        task,
        config=dataclasses.replace(task.config, reward=rewards),
        steps=2,
        batch_size=8,
        mini_batch_size=4,
        checkpoints=(1, 2),
    )
    run = Run(task, PLAUDIT, Point(0.01, 0.03), 0)
    by_evaluate = {}

    def judge(adapters: str) -> Judged:
        config = dataclasses.replace(
            evaluation(task, adapters), n_prompts=6, reward=rewards, output_dir=tmp_path / "evaluation"
        )
        by_evaluate[adapters] = evaluate.by_rewards(config)
        with RewardClient(rewards) as client:
            client.connect()
            assert judge_adapters(config, client, before=True) == Judged(
                0.0, [sample.reward_before for sample in by_evaluate[adapters].samples]
            )
            return judge_adapters(config, client)

    result = result_of(run, tmp_path, tmp_path / "work", classic_python=None, judge=judge)
    assert [len(result.rewards), result.kls[0], [*result.held_out]] == [2, 0.0, ["1", "2"]]
    for judged, evaluated in zip(result.held_out.values(), by_evaluate.values(), strict=True):
        assert judged.kl == evaluated.evaluation.kl > 0
        assert list(judged.rewards) == [sample.reward_after for sample in evaluated.samples]
    assert [file.name for file in tmp_path.glob("*.json")] == [f"{run.name}.json"]
    assert not list((tmp_path / "work").iterdir())
    assert json.loads((tmp_path / f"{run.name}.json").read_text())["hyperparameters"]["learning_rate"] == 0.01
