"""Evaluation while training: the same figures whenever a run was stopped, and no effect on the training."""

import dataclasses
import json
import shutil
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import kills
from harness.runs import TrainerProcess, assert_same_run, start_ranks
from harness.stub_reward_server import StubRewardServer, stub_reward
from plaudit.errors import ConfigError
from plaudit.rewards import RewardUnavailable
from plaudit.rewards.settings import RewardSettings
from plaudit.run.evaluations import read_answers, read_evaluations
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.generate import GenerateConfig
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.watch import WatchSettings
from plaudit.stages import evaluate, generate, ppo

N = 12
WATCH = WatchSettings(eval_every=2, eval_prompts=N)


@pytest.fixture
def config(config: PPOConfig) -> PPOConfig:
    return dataclasses.replace(config, steps=5, watch=WATCH)


@pytest.fixture
def undisturbed(config: PPOConfig, tmp_path: Path) -> Path:
    return ppo.run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir


def watched(directory: Path) -> dict[str, bytes]:
    """The bytes of everything that evaluation wrote; of `best`, what doesn't name the output directory."""
    files = {name: content for name, content in kills.contents(directory).items() if name.startswith("held-out/")}
    best = {name: (directory / "best" / name).read_bytes() for name in ("adapter_model.safetensors", "state.pt")}
    return files | best | {"evaluations": (directory / "evaluations.jsonl").read_bytes()}


def test_the_figures_are_those_of_the_answers_and_the_first_policy_is_its_reference(undisturbed: Path) -> None:
    records = read_evaluations(undisturbed)
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    first, last = read_answers(undisturbed, 0), read_answers(undisturbed, 5)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in last]
    assert records[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert records[0]["eval/win_rate"] == 0.5
    rewards = [stub_reward(row["prompt"], row["response"]) for row in last]
    assert records[3]["eval/reward"] == pytest.approx(statistics.fmean(rewards), abs=1e-6)
    assert records[3]["eval/length"] == statistics.fmean(row["length"] for row in last)
    assert records[3]["eval/kl"] == pytest.approx(statistics.fmean(row["kl"] for row in last))
    wins = [
        0.5 if now["reward"] == before["reward"] else float(now["reward"] > before["reward"])
        for now, before in zip(last, first, strict=True)
    ]
    assert records[3]["eval/win_rate"] == pytest.approx(statistics.fmean(wins))
    assert records[3]["eval/reward_low"] < records[3]["eval/reward"] < records[3]["eval/reward_high"]
    assert 0 <= records[3]["eval/ended_share"] <= 1
    assert "from step 0 to step 5" in (undisturbed / "training.html").read_text()


def test_evaluation_changes_nothing_of_the_training(config: PPOConfig, undisturbed: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(config, watch=WatchSettings(), output_dir=tmp_path / "plain")
    assert_same_run(ppo.run(plain).output_dir, undisturbed)
    assert not (tmp_path / "plain" / "best").exists()


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_has_the_same_evaluations_to_the_bit(
    config: PPOConfig, undisturbed: Path, stopped_after: int
) -> None:
    ppo.run(dataclasses.replace(config, steps=3))
    for step in range(stopped_after + 1, 4):
        shutil.rmtree(config.output_dir / "checkpoints" / f"step-{step:06d}")
    ppo.run(dataclasses.replace(config, resume="auto"))
    expected = watched(undisturbed)
    got = watched(config.output_dir)
    if stopped_after == 3:
        # The first run was to end there, and evaluated its last policy. That stays.
        assert [record["step"] for record in read_evaluations(config.output_dir)] == [0, 2, 3, 4, 5]
        got, expected = (
            {k: v for k, v in x.items() if k.startswith("held-out/step-00000") and k[19] != "3"}
            for x in (got, expected)
        )
    assert got == expected
    assert_same_run(config.output_dir, undisturbed)


@pytest.mark.slow
def test_a_killed_run_has_the_same_evaluations_to_the_bit(config: PPOConfig, undisturbed: Path) -> None:
    process = TrainerProcess(dataclasses.replace(config, checkpoint_every=2))
    process.wait_for_line("held-out after step 4")
    process.signal(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    code, stderr = TrainerProcess(dataclasses.replace(config, checkpoint_every=2), "--resume", "auto").end()
    assert code == 0, stderr
    assert watched(config.output_dir) == watched(undisturbed)
    assert_same_run(config.output_dir, undisturbed)


def test_an_evaluation_without_rewards_is_repeated_by_the_resumed_run(
    config: PPOConfig, undisturbed: Path, stub_reward_server: StubRewardServer
) -> None:
    prompt = read_answers(undisturbed, 2)[0]["prompt"]
    stub_reward_server.script(
        # The reference's and the first policy's answers to it are scored, those after step 2 are not.
        [{"do": "score", "when": prompt, "times": 2}, {"do": "status", "status": 503, "when": prompt, "times": 1000}]
    )
    with pytest.raises(RewardUnavailable):
        ppo.run(config)
    assert [record["step"] for record in read_evaluations(config.output_dir)] == [0]
    stub_reward_server.script([])
    ppo.run(dataclasses.replace(config, resume="auto"))
    assert watched(config.output_dir) == watched(undisturbed)


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_best_policy_can_be_resumed_evaluated_and_asked(
    config: PPOConfig, tmp_path: Path, lora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        config, lora=LoraSettings(enabled=lora), watch=dataclasses.replace(WATCH, eval_every=1)
    )
    run = ppo.run(config).output_dir
    best, records = run / "best", read_evaluations(run)
    top = max(records, key=lambda record: record["eval/reward"])
    step = json.loads((best / "manifest.json").read_text())["step"]
    assert step == top["step"]
    # `plaudit evaluate` draws as the evaluation while training did.
    judged = evaluate.run(
        EvaluateConfig(
            after=str(best),
            policy=config.policy,
            output_dir=tmp_path / "evaluation",
            dataset=config.dataset,
            generation=config.generation,
            reward=config.reward,
            n_prompts=N,
        )
    )
    assert isinstance(judged, evaluate.EvaluationResult)
    assert [row.response_after for row in judged.samples] == [row["response"] for row in read_answers(run, step)]
    assert judged.evaluation.reward.after.mean == pytest.approx(top["eval/reward"], abs=1e-6)
    assert judged.evaluation.kl == pytest.approx(top["eval/kl"], abs=1e-4)
    (answer,) = generate.run(GenerateConfig(run=str(best), texts=("Film 3 is",)))
    assert answer.response
    expected = read_evaluations(run)
    ppo.run(dataclasses.replace(config, resume=str(best)))
    assert f"resuming after step {step} from {best}" in capsys.readouterr().out
    assert read_evaluations(run) == expected


def test_a_best_policy_of_a_step_that_is_repeated_is_dropped(config: PPOConfig) -> None:
    run = ppo.run(dataclasses.replace(config, watch=dataclasses.replace(WATCH, eval_every=1))).output_dir
    first = run / "checkpoints" / "step-000004"
    step = json.loads((run / "best" / "manifest.json").read_text())["step"]
    manifest = json.loads((run / "best" / "manifest.json").read_text()) | {"step": 5}
    (run / "best" / "manifest.json").write_text(json.dumps(manifest))
    ppo.run(dataclasses.replace(config, watch=dataclasses.replace(WATCH, eval_every=1), resume=str(first), steps=4))
    assert not (run / "best").exists(), step


def test_a_run_that_reaches_its_target_ends_early_with_a_checkpoint_and_stays_ended(
    config: PPOConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = dataclasses.replace(WATCH, stop_kl=1e-9)
    config = dataclasses.replace(config, watch=watch, checkpoint_every=50)
    result = ppo.run(config)
    out = capsys.readouterr().out
    assert result.steps == 2
    assert "the run ends early: after step 2, the held-out KL is 0.0" in out
    assert "more than watch.stop_kl=1e-09" in out
    assert [path.name for path in (config.output_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert ppo.run(dataclasses.replace(config, resume="auto")).steps == 2
    # Without the bound it goes on.
    assert ppo.run(dataclasses.replace(config, resume="auto", watch=WATCH)).steps == 5


def test_a_second_judge_is_asked_for_the_held_out_answers_alone_and_never_gets_the_first_ones_key(
    config: PPOConfig, start_stub: Callable[[], StubRewardServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_REWARD_API_KEY", "secret-of-the-first")
    second = start_stub()
    watch = dataclasses.replace(WATCH, judges=RewardSettings.of(url=(second.url,)), best_by="judge/reward")
    run = ppo.run(dataclasses.replace(config, watch=watch, steps=2)).output_dir
    records = read_evaluations(run)
    # Both are the same function of the text.
    for name in ("reward", "reward_low", "win_rate", "win_rate_high"):
        assert records[1][f"eval/judge/{name}"] == pytest.approx(records[1][f"eval/{name}"], abs=1e-6)
    for row in read_answers(run, 2):
        assert row["judges"]["judge"] == pytest.approx(row["reward"], abs=1e-6)
    assert sum(second.state["scored"].values()) == 3 * N
    assert second.state["headers"].get("authorization") is None


def test_other_held_out_prompts_than_before_are_refused(config: PPOConfig) -> None:
    ppo.run(dataclasses.replace(config, steps=2))
    with pytest.raises(ConfigError, match=r"watch\.eval_prompts: 12 -> 6"):
        ppo.run(dataclasses.replace(config, resume="auto", watch=dataclasses.replace(WATCH, eval_prompts=6)))


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(config: PPOConfig, undisturbed: Path) -> None:
    for code, stderr in [rank.end() for rank in start_ranks(dataclasses.replace(config, device="cpu"), 2)]:
        assert code == 0, stderr
    ours, theirs = read_evaluations(config.output_dir), read_evaluations(undisturbed)
    assert [record["step"] for record in ours] == [0, 2, 4, 5]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert [row["response"] for row in read_answers(config.output_dir, 0)] == [
        row["response"] for row in read_answers(undisturbed, 0)
    ]
    assert ours[3]["eval/kl"] == pytest.approx(theirs[3]["eval/kl"], rel=0.05)
    assert (config.output_dir / "best" / "adapter_model.safetensors").is_file()
