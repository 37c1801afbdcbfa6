"""Rounds of ranking on tiny models: killed in every stage and gone on with, and what ends a loop before its end."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.ranking_service import KEY, RankingService
from harness.reward_service import RewardService
from harness.runs import TrainerProcess, preset_of
from harness.stub_reward_server import StubRewardServer
from harness.tiny_models import tiny_classifier_dir
from plaudit import cli, errors
from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardSettings
from plaudit.run.loop_state import ROUNDS_FILE, STATE_FILE
from plaudit.run.rankings import RankingsUnavailable
from plaudit.run.serving import revision_of
from plaudit.settings.data import DataSettings
from plaudit.settings.loop import (
    LoopConfig,
    RankingRewardModelSettings,
    SamplingSettings,
    SimulatedPeople,
)
from plaudit.settings.people import PeopleSettings
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOHyperparameters
from plaudit.settings.supervised import OptimizerSettings
from plaudit.stages import annotate, loop
from plaudit.stages.loop_settings import Ranking, Round
from plaudit.stages.ranked_answers import AtChance

pytestmark = pytest.mark.slow

ADMIN_KEY = "the-administrators-key"
STAGES = (
    *("round-1/sample", "round-1/people", "round-1/reward-model", "round-1/ppo"),
    *("round-1/against-stage-1", "round-1/judged-against-stage-1"),
    *("round-2/sample", "round-2/people", "round-2/reward-model", "round-2/ppo"),
    *("round-2/against-stage-1", "round-2/against-round-1"),
    *("round-2/judged-against-stage-1", "round-2/judged-against-round-1"),
)
MOMENTS = {"ppo": "PPO step 1/"}
"""What a stage has said when it is killed; of the others, that it has begun."""


@pytest.fixture
def config(policy_dir: Path, reviews: Path, service: RankingService, tmp_path: Path) -> LoopConfig:
    """Two rounds of a few prompts, ranked by people in the service."""
    return LoopConfig(
        policy=str(policy_dir),
        output_dir=tmp_path / "loop",
        dataset=DataSettings(str(reviews), held_out_fraction=0.3),
        rank_url=service.url,
        people=PeopleSettings(patience_s=20),
        people_patience_s=20,
        people_poll_s=0.1,
        sample=SamplingSettings(n=10, k=3),
        reward_model=RankingRewardModelSettings(
            max_length=48, optimizer=OptimizerSettings(batch_size=8), held_out_fraction=0.3, allow_chance=True
        ),
        lora=LoraSettings(r=2),
        ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=1),
        steps=2,
        checkpoint_every=1,
        n_prompts=6,
        device="cpu",
    )


def files_of(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of every file."""
    found = {str(path.relative_to(directory)): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def stage_dirs(config: LoopConfig) -> list[Path]:
    """The directories of the stages that are finished."""
    finished = json.loads((config.output_dir / STATE_FILE).read_text())["finished"]
    named = {"sample": "answers"}
    paths = (config.output_dir / key.replace("sample", named["sample"]) for key in finished)
    return [path for path in paths if path.is_dir()]


@pytest.mark.timeout(900)  # it starts the loop fifteen times, and the machine may be busy
def test_a_loop_that_is_killed_in_every_stage_of_both_rounds_repeats_nothing_that_was_finished(
    config: LoopConfig,
    stub_reward_server: StubRewardServer,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("REWARD_ADMIN_KEY", ADMIN_KEY)
    served = tiny_classifier_dir(config.output_dir / loop.SERVED, labels=("score",))
    reward = RewardService(served)
    environment = {"REWARD_ADMIN_KEY": ADMIN_KEY, "PLAUDIT_REWARD_API_KEY": ADMIN_KEY, "RANK_API_KEY": KEY}
    config = dataclasses.replace(
        config,
        judge=stub_reward_server.url,
        simulated=SimulatedPeople(annotators=3),
        reward=RewardSettings.of(url=(reward.url,), patience_s=20.0),
        resume="auto",
    )
    kept: dict[Path, dict[str, tuple[int, int, int]]] = {}
    try:
        for stage in STAGES:
            running = TrainerProcess(config, environment=environment, command="loop")
            running.wait_for_line(f"{stage}: begun")
            if (name := stage.partition("/")[2]) in MOMENTS:
                running.wait_for_line(MOMENTS[name])
            running.signal(signal.SIGKILL)
            assert running.end()[0] == -signal.SIGKILL
            assert json.loads((config.output_dir / STATE_FILE).read_text())["at"] == stage
            kept |= {path: files_of(path) for path in stage_dirs(config) if path not in kept}
        last = TrainerProcess(config, environment=environment, command="loop")
        code, said = last.end()
        assert code == 0, said
    finally:
        reward.kill()
    finished = {str(path.relative_to(config.output_dir)) for path in kept}
    assert finished == {stage.replace("sample", "answers") for stage in STAGES[:-1] if not stage.endswith("people")}
    for path, files in kept.items():
        assert files_of(path) == files, path
    records = [json.loads(line) for line in (config.output_dir / ROUNDS_FILE).read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert {key for record in records for key in record} == set(records[0])
    assert all(rate["prompts"] == 6 for r in records for by in r["win_rates"].values() for rate in by.values())
    assert {by: set(rates) for by, rates in records[1]["win_rates"].items()} == {
        "reward_model": {"stage-1", "round-1"},
        "judge": {"stage-1", "round-1"},
    }
    assert records[1]["all_rankings"] == records[0]["rankings"] + records[1]["rankings"]
    models = [config.output_dir / f"round-{number}" / "reward-model" for number in (1, 2)]
    assert [record["revision"] for record in records] == [revision_of(model) for model in models]
    assert revision_of(served) == records[1]["revision"] != records[0]["revision"]
    answers = [(config.output_dir / f"round-{n}" / "answers" / "answers.jsonl").read_text() for n in (1, 2)]
    prompts = [[json.loads(line)["prompt"] for line in text.splitlines()] for text in answers]
    assert not set(prompts[0]) & set(prompts[1])
    assert len(prompts[0]) == len(prompts[1]) == 10
    total = sum(seconds for record in records for seconds in record["seconds"].values())
    record_property("seconds of all stages of two rounds, start-ups apart", round(total, 1))


def test_with_nothing_but_models_the_loop_starts_every_service(
    config: LoopConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK_API_KEY")
    judge = tiny_classifier_dir(tmp_path / "judge")
    config = dataclasses.replace(
        config, rounds=1, rank_url=None, judge=str(judge), simulated=SimulatedPeople(annotators=3)
    )
    [record] = loop.run(config)
    assert record["people"] == 3
    assert set(record["win_rates"]) == {"reward_model", "judge"}
    assert record["judge"] is not None
    page = (config.output_dir / loop.REPORT_FILE).read_text()
    assert f"{record['held_out_accuracy']:.3f}" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_people_who_have_not_finished_end_it_with_75_and_the_command_that_goes_on(
    config: LoopConfig,
    service: RankingService,
    stub_reward_server: StubRewardServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = dataclasses.replace(config, people_patience_s=0)
    flags = ["--config", str(preset_of(config))]
    assert cli.run(["loop", *flags]) == errors.EXIT_UNAVAILABLE
    said = capsys.readouterr().err
    assert "people have ranked 0 of" in said
    assert f"plaudit loop --config {flags[1]} --resume auto" in said
    answers = files_of(config.output_dir / "round-1" / "answers")
    with pytest.raises(ConfigError, match="holds a loop; go on with --resume auto"):
        loop.run(config)

    simulated = dataclasses.replace(config, judge=stub_reward_server.url, simulated=SimulatedPeople(annotators=3))
    annotate.run(Round(simulated, 1, config.batch).annotate(Ranking(service.url, None)))
    few = dataclasses.replace(config.reward_model, allow_chance=False)
    going_on = dataclasses.replace(config, resume="auto", reward_model=few)
    with pytest.raises(AtChance, match="the model is at chance") as caught:
        loop.run(going_on)
    assert caught.value.exit_code == errors.EXIT_REJECTED
    assert "--reward-model.allow-chance" in caught.value.__notes__[0]
    assert not (config.output_dir / "round-1" / "ppo").exists()
    assert files_of(config.output_dir / "round-1" / "answers") == answers


def test_a_ranking_service_that_is_gone_is_waited_for_and_then_75(config: LoopConfig, service: RankingService) -> None:
    service.kill()
    config = dataclasses.replace(config, people=PeopleSettings(patience_s=0.5))
    with pytest.raises(RankingsUnavailable, match=r"gave no answer for 0\.5 s") as caught:
        loop.run(config)
    assert caught.value.exit_code == errors.EXIT_UNAVAILABLE
    assert caught.value.can_be_resumed


def test_other_settings_than_those_of_then_are_refused_and_more_rounds_are_not(config: LoopConfig) -> None:
    config = dataclasses.replace(config, people_patience_s=0)
    with pytest.raises(RankingsUnavailable):
        loop.run(config)
    with pytest.raises(ConfigError, match=r"sample\.k: 3 -> 2"):
        loop.run(dataclasses.replace(config, resume="auto", sample=SamplingSettings(n=10, k=2)))
    with pytest.raises(RankingsUnavailable, match="people have ranked 0 of"):
        loop.run(dataclasses.replace(config, resume="auto", rounds=3))


def test_a_batch_of_another_loop_is_left_alone(config: LoopConfig, service: RankingService, tmp_path: Path) -> None:
    config = dataclasses.replace(config, people=PeopleSettings(batch="shared", patience_s=20), people_patience_s=0)
    with pytest.raises(RankingsUnavailable):
        loop.run(config)
    other = dataclasses.replace(config, output_dir=tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"has a batch 'shared-round-1', and it isn't this loop's"):
        loop.run(other)
    assert service.progress("shared-round-1")["tasks"] == 10


def test_nobody_who_ranks_is_told_at_once(config: LoopConfig) -> None:
    with pytest.raises(ConfigError, match=r"nobody ranks: .* --rank-url"):
        loop.run(dataclasses.replace(config, rank_url=None))


REFUSED: tuple[tuple[Callable[[], object], str], ...] = (
    (lambda: LoopConfig(simulated=SimulatedPeople(annotators=3)), "simulated.annotators=3 rank by a judge"),
    (
        lambda: LoopConfig(judge="j", simulated=SimulatedPeople(annotators=2)),
        "simulated.annotators=2 can't give the 3 rankings",
    ),
    (lambda: LoopConfig(resume="runs/x"), "resume='runs/x' must be auto"),
    (lambda: LoopConfig(rounds=0), "rounds=0 must be greater than 0"),
    (lambda: LoopConfig(reward=RewardSettings.of(function="a:b")), "the loop's only reward is the model"),
    (lambda: LoopConfig(rank_url="localhost:8100"), "must start with http://"),
    (lambda: SimulatedPeople(skips=2.0), "skips=2.0 must lie between 0 and 1"),
    (lambda: SamplingSettings(k=1), "k=1 must lie between 2 and"),
)


@pytest.mark.parametrize(("made", "message"), REFUSED)
def test_settings_that_cannot_work_are_refused(made: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made()
    assert message in str(caught.value)


def test_the_preset_is_complete() -> None:
    parsed = cli.parse("loop", ["--config", "loop"])
    assert parsed.simulated.annotators
    assert parsed.judge == "models/imdb-distilbert-mini"
    assert os.fspath(parsed.output_dir) == "runs/loop"
