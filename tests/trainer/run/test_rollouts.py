"""Rollouts on disk: each response once, whole after a kill, and readable by `datasets`."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from harness import kills
from plaudit.learner.rollout import CollectedRollout
from plaudit.learner.stepper import StepResult
from plaudit.policy.samples import EvaluatedSamples, Samples
from plaudit.run.rollouts import RolloutLog, forget_rollouts_after, read_rollouts, rollout_files
from plaudit.settings.watch import WatchSettings

ALL = WatchSettings(rollouts="all")
LENGTHS = (3, 1, 2, 1)
NASTY = 'two\nlines, "quotes",\u2028a separator and ünïcode'


def step_of(step: int) -> tuple[CollectedRollout, StepResult]:
    """Four responses. Token t of response b has KL 1, advantage t and value 10 b + t."""
    samples = Samples.from_lists(
        [[7, 8], [9], [7], [8, 9]], [list(range(1, n + 1)) for n in LENGTHS], pad_token_id=0, device="cpu"
    )
    mask = samples.mask
    columns = torch.arange(mask.shape[1]).float().expand(mask.shape)
    values = (10 * torch.arange(4.0).unsqueeze(1) + columns).masked_fill(~mask, 0)
    kls, advantages = mask.float(), columns.masked_fill(~mask, 0)
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0]) + step
    evaluated = EvaluatedSamples(samples=samples, logprobs=-kls, values=values, ref_logprobs=-2 * kls)
    collected = CollectedRollout(
        rollout=evaluated.with_scores(scores),
        prompts=[f"prompt {i}" for i in range(4)],
        fields={},
        responses=[NASTY, "", "c", "d"],
        ended=[True, False, True, False],
        components={"film": (2 * scores).tolist(), "length": [3.0, 1.0, 2.0, 1.0]},
        waited_s=0.0,
    )
    result = StepResult(
        statistics={},
        mask=mask,
        logprobs=-kls,
        ref_logprobs=-2 * kls,
        values=values,
        kls=kls,
        scores=scores / 2,
        non_score_rewards=-kls,
        rewards=kls,
        advantages=advantages,
        returns=values,
        minibatch_permutations=[],
    )
    return collected, result


def write_steps(directory: Path, settings: WatchSettings, steps: range) -> None:
    """As a run does that continues from a checkpoint after `steps.start` steps."""
    forget_rollouts_after(directory, steps.start)
    log = RolloutLog(directory, settings)
    for step in steps:
        log.write(step, *step_of(step))


def test_a_record_by_hand(tmp_path: Path) -> None:
    write_steps(tmp_path, ALL, range(1))
    rows = list(read_rollouts(tmp_path))
    assert rows[0] == {
        "step": 0,
        "row": 0,
        "prompt": "prompt 0",
        "response": NASTY,
        "prompt_tokens": [7, 8],
        "response_tokens": [1, 2, 3],
        "length": 3,
        "finish_reason": "stop",
        "reward": 0.5,
        "rewards": {"film": 1.0, "length": 3.0},
        "score": 0.25,
        "kl": 3.0,
        "advantage": 1.0,
        "value": 0.0,
    }
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [row["value"] for row in rows] == [0.0, 10.0, 20.0, 30.0]
    assert rows[1]["finish_reason"] == "length"


def test_sampled_rows_are_at_even_distances_and_off_writes_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path / "two", WatchSettings(rollouts="sampled", rollouts_per_step=2), range(2))
    assert [(row["step"], row["row"]) for row in read_rollouts(tmp_path / "two")] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    write_steps(tmp_path / "many", WatchSettings(rollouts="sampled", rollouts_per_step=99), range(1))
    assert len(list(read_rollouts(tmp_path / "many"))) == 4
    write_steps(tmp_path / "off", WatchSettings(), range(2))
    assert not (tmp_path / "off").exists()


def test_datasets_loads_all_files_with_one_schema(tmp_path: Path) -> None:
    import datasets

    write_steps(tmp_path, dataclasses.replace(ALL, rollout_file_mib=0.002), range(4))
    assert len(rollout_files(tmp_path)) > 1
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rollouts" / "*.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [dict(row) for row in loaded] == list(read_rollouts(tmp_path))
    assert loaded["step"] == [step for step in range(4) for _ in LENGTHS]


def test_a_file_ends_at_its_size_and_holds_whole_steps(tmp_path: Path) -> None:
    write_steps(tmp_path, dataclasses.replace(ALL, rollout_file_mib=0.002), range(6))
    files = rollout_files(tmp_path)
    assert all(file.stat().st_size <= 0.002 * 2**20 for file in files)
    assert [file.name for file in files] == [f"from-step-{step:06d}.jsonl" for step in range(6)]
    # One that is larger than a file gets a file of its own.
    write_steps(tmp_path / "tiny", dataclasses.replace(ALL, rollout_file_mib=1e-6), range(3))
    assert len(rollout_files(tmp_path / "tiny")) == 3


@pytest.mark.parametrize("resume_from", [0, 1, 3, 4])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, resume_from: int) -> None:
    settings = dataclasses.replace(ALL, rollout_file_mib=0.0035)
    write_steps(tmp_path / "one", settings, range(6))
    write_steps(tmp_path / "other", settings, range(4))
    write_steps(tmp_path / "other", settings, range(resume_from, 6))
    assert kills.contents(tmp_path / "other") == kills.contents(tmp_path / "one")


def test_a_kill_at_any_file_operation_leaves_whole_steps_and_a_resume_completes_them(tmp_path: Path) -> None:
    settings = dataclasses.replace(ALL, rollout_file_mib=0.0035)
    start, root = tmp_path / "start", tmp_path / "run"
    write_steps(start, settings, range(3))
    write_steps(tmp_path / "undisturbed", settings, range(6))
    for operations in kills.after_each_kill(lambda root: write_steps(root, settings, range(2, 6)), start, root):
        steps = [row["step"] for row in read_rollouts(root)]
        assert steps == [step for step in range(len(steps) // 4) for _ in LENGTHS], operations
        assert steps[:8] == [0] * 4 + [1] * 4
        for file in rollout_files(root):
            assert file.read_bytes().endswith(b"\n")
        write_steps(root, settings, range(2, 6))
        assert kills.contents(root) == kills.contents(tmp_path / "undisturbed")


def test_the_same_after_a_real_sigkill(tmp_path: Path) -> None:
    start, root = tmp_path / "start", tmp_path / "run"
    write_steps(start, ALL, range(2))
    for operations in (1, 4, 7):
        kills.fresh(start, root)
        kills.really_killed(lambda root: write_steps(root, ALL, range(2, 6)), root, operations)
        assert {row["step"] for row in read_rollouts(root)} >= {0, 1}
        for file in rollout_files(root):
            assert all(json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1])


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    collected, result = step_of(0)
    log = RolloutLog(tmp_path, ALL)
    log.write(0, collected, dataclasses.replace(result, values=result.values + math.inf))
    assert [row["value"] for row in read_rollouts(tmp_path)] == [None] * 4
