"""A judge behind a real endpoint, judged by preferences."""

import dataclasses
import json
from pathlib import Path

import pytest

from harness.stub_reward_server import StubRewardServer, stub_reward
from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.evaluate_judge import JudgeConfig
from plaudit.stages import evaluate_judge


@pytest.fixture
def config(stub_reward_server: StubRewardServer, tmp_path: Path) -> JudgeConfig:
    """100 prompts; in the first 60 people said what the stub says, in the others the opposite."""
    lines = []
    for i in range(100):
        answers = sorted((f" answer {i}-{j}" for j in range(3)), key=lambda text: -stub_reward(f"Prompt {i}", text))
        lines.append({"prompt": f"Prompt {i}", "answers": answers if i < 60 else answers[::-1]})
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JudgeConfig(
        preferences=str(path),
        output_dir=tmp_path / "judged",
        reward=RewardSettings.of(url=(stub_reward_server.url,), patience_s=0.5, request_timeout_s=10.0),
    )


def test_its_accuracy_is_how_often_it_says_what_people_said(config: JudgeConfig) -> None:
    result = evaluate_judge.run(config)
    assert (result.figures.prompts, result.figures.pairs) == (100, 300)
    assert result.figures.accuracy == pytest.approx(0.6)
    low, high = result.figures.accuracy_ci95
    assert 0.45 < low < 0.55 < 0.65 < high < 0.75
    figures = json.loads((config.output_dir / "judge.json").read_text())
    assert figures["figures"]["accuracy"] == result.figures.accuracy
    assert figures["revision"] == "sha256:stub"
    scored = [json.loads(line) for line in (config.output_dir / "judge-scores.jsonl").read_text().splitlines()]
    assert len(scored) == 100
    for line in scored:
        assert line["scores"] == [pytest.approx(stub_reward(line["prompt"], answer)) for answer in line["answers"]]


def test_a_limit_takes_the_first_prompts_of_an_order_that_the_file_does_not_decide(config: JudgeConfig) -> None:
    evaluate_judge.run(dataclasses.replace(config, limit=10))
    scores = config.output_dir / "judge-scores.jsonl"
    few = scores.read_text().splitlines()
    assert len(few) == 10
    path = Path(config.preferences)
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))
    evaluate_judge.run(dataclasses.replace(config, limit=20))
    assert scores.read_text().splitlines()[:10] == few


def test_the_held_out_split_is_that_of_the_reward_model(config: JudgeConfig) -> None:
    held_out = evaluate_judge.run(dataclasses.replace(config, split="held_out"))
    assert 3 <= held_out.figures.prompts <= 20


def test_without_preferences_it_says_so(config: JudgeConfig) -> None:
    with pytest.raises(ConfigError, match="preferences is missing"):
        evaluate_judge.run(dataclasses.replace(config, preferences=""))
    Path(config.preferences).write_text('{"prompt": "p", "answers": ["a", "a"]}\n')
    with pytest.raises(ConfigError, match="no prompt with two answers that somebody tells apart"):
        evaluate_judge.run(config)
