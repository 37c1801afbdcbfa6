"""A judge behind a real endpoint, judged by preferences."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.reward_service import RewardService
from harness.stub_reward_server import StubRewardServer, stub_reward
from harness.tiny_models import tiny_classifier_dir
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
    assert figures["revision"] == "sha256:stub (label POSITIVE)"
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


def test_conversations_are_judged_by_the_services_own_template(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path / "judge", labels=("LABEL_0",))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m.role }} . {{ m.content }} [SEP]{% endfor %}"
    tokenizer.save_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    asked = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": f"film {i} ?"}] for i in range(6)]
    said = [[[{"role": "assistant", "content": word}] for word in ("good story", "bad plot")] for _ in asked]
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(asked, said, strict=True)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    service = RewardService(directory, "--join", "chat")
    try:
        reward = RewardSettings.of(url=(service.url,), patience_s=60.0)
        evaluate_judge.run(JudgeConfig(str(tmp_path / "preferences.jsonl"), output_dir=tmp_path / "out", reward=reward))
    finally:
        service.kill()
    scored = [json.loads(line) for line in (tmp_path / "out" / "judge-scores.jsonl").read_text().splitlines()]
    assert {json.dumps(line["prompt"]) for line in scored} == {json.dumps(prompt) for prompt in asked}
    for line in scored:
        for answer, score in zip(line["answers"], line["scores"], strict=True):
            whole = [*line["prompt"], {"role": "assistant", "content": answer}]
            with torch.no_grad():
                logits = model(**tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)).logits
            assert score == pytest.approx(logits[0, 0].item(), abs=1e-4)
