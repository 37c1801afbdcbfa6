"""The examples' files fit together: data, reward function and settings."""

import json
from pathlib import Path

import pytest

from examples.exact_answer import make_data, reward
from plaudit.data.prompts import load_prompts
from plaudit.policy.pretrained import load_tokenizer
from plaudit.rewards.function import load
from plaudit.settings import files
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.sft import SFTConfig

EXAMPLE = Path(__file__).parents[1] / "examples" / "exact_answer"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("TEXTS", 30), ("TRAIN", 20), ("TEST", 10)):
        monkeypatch.setattr(make_data, name, count)
    make_data.main(Path("data"))
    return tmp_path


def test_no_three_words_stand_in_two_files_and_the_answer_is_the_last(directory: Path) -> None:
    rows = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (directory / "data").rglob("*.jsonl")
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "texts.jsonl": 30,
        "train.jsonl": 20,
        "test.jsonl": 10,
    }
    words = {
        name: [frozenset((row.get("prompt") or row["text"]).split(": ")[1].split(".")[0].split(", ")) for row in found]
        for name, found in rows.items()
    }
    everything = [three for found in words.values() for three in found]
    assert len(set(everything)) == len(everything) == 60
    for row in (*rows["train.jsonl"], *rows["test.jsonl"]):
        assert row["prompt"].endswith(f", {row['answer']}. Last word:")


def test_the_settings_read_the_data_and_name_the_function(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    sft = files.load(SFTConfig, EXAMPLE / "sft.yaml")
    training, judging = (
        files.load(PPOConfig, EXAMPLE / "ppo.yaml"),
        files.load(EvaluateConfig, EXAMPLE / "evaluate.yaml"),
    )
    assert (training.policy, judging.after) == (str(sft.output_dir), str(training.output_dir))
    assert training.reward.components == judging.reward.components
    function = training.reward.components[0].function
    assert function is not None
    assert load(function).__name__ == "exact"
    tokenizer = load_tokenizer("imdb-gpt2-mini")
    train = load_prompts(training.dataset, training.prompts, tokenizer, "train", seed=0)
    test = load_prompts(judging.dataset, judging.prompts, tokenizer, "held_out", seed=0)
    assert (len(train), len(test)) == (20, 10)
    assert all(f", {right}. " in text for text, right in zip(test.texts, test.fields["answer"], strict=True))


def test_the_reward_is_1_for_the_exact_answer_alone() -> None:
    assert reward.exact(["p"] * 4, [" story", "story", " story.", ""], answer=["story"] * 4) == [1.0, 1.0, 0.0, 0.0]
