"""`plaudit init`: what it guesses of a file's columns, and that every stage can read what it writes."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.own_reviews import write_reviews
from plaudit import cli, errors
from plaudit.data.guesses import Columns, guess
from plaudit.data.tables import Table
from plaudit.errors import ConfigError
from plaudit.settings import files
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.init import InitConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig
from plaudit.stages import init

TALK = [{"role": "user", "content": "Why?"}]
ANSWERED = [*TALK, {"role": "assistant", "content": "Because."}]
TEXTS = [f"a long review of film number {i}, which was seen" for i in range(40)]


def table(**columns: list[Any]) -> Table:
    return Table({name: (values * 40)[:40] for name, values in columns.items()})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (table(review=TEXTS, stars=["1", "5"]), Columns(text="review", label="stars")),
        (table(id=[str(i) for i in range(40)], note=TEXTS, verdict=["a", "b"]), Columns(text="note", label="verdict")),
        (table(text=TEXTS), Columns(text="text")),
        (table(title=[f"t{i}" for i in range(40)], body=TEXTS), Columns(text="body")),
        (table(Review=TEXTS, Sentiment=["pos", "neg"]), Columns(text="Review", label="Sentiment")),
        (table(text=TEXTS, a=["x", "y"], b=["p", "q"]), Columns(text="text")),  # which of two is a label is not guessed
        (table(question=TEXTS, answer=TEXTS), Columns(prompt="question", completion="answer")),
        (table(prompt=TEXTS), Columns(prompt="prompt")),
        (table(messages=[TALK]), Columns(messages="messages")),
        (table(chat=[json.dumps(ANSWERED)]), Columns(messages="chat", ends_with_answer=True)),
        (table(prompt=TEXTS, chosen=["a"], rejected=["b"]), Columns(prompt="prompt", ranked=True)),
        (table(chosen=[ANSWERED], rejected=[ANSWERED]), Columns(ranked=True)),
    ],
)
def test_columns_are_guessed_by_name_and_by_what_they_hold(columns: Table, expected: Columns) -> None:
    assert guess(columns) == expected


def test_the_guesses_are_said_with_an_example_and_what_is_not_used() -> None:
    some = table(id=[str(i) for i in range(40)], review=TEXTS, stars=["1", "5"])
    assert guess(some).lines(some) == [
        f"text: column 'review', for example {TEXTS[0]!r:.60}",
        "label: column 'stars', for example '1'",
        "not used: id",
    ]


def write_jsonl(path: Path, **columns: list[Any]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    assert cli.run(["init", str(path), "--output", str(path.parent / "mine.yaml")]) == 0
    return path.parent / "mine.yaml", capsys.readouterr().out


def test_reviews_with_stars_give_a_file_and_five_commands_that_parse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, said = written(write_reviews(tmp_path / "my reviews.csv"), capsys)
    sft = files.load(SFTConfig, file)
    assert (sft.dataset.data, sft.dataset.text_column) == (str(tmp_path / "my reviews.csv"), "review")
    judge = files.load(RewardModelConfig, file)
    assert (judge.dataset.label_column, judge.label_names) == ("stars", ("NEGATIVE", "POSITIVE"))
    training, evaluation = files.load(PPOConfig, file), files.load(EvaluateConfig, file)
    assert training.dataset == evaluation.dataset == sft.dataset == judge.dataset
    assert training.prompts == evaluation.prompts
    assert training.generation == evaluation.generation
    assert training.reward == evaluation.reward
    assert training.ppo == PPOConfig().ppo  # all of it open, to be chosen
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("plaudit")]
    assert [command[:2] for command in commands] == [
        ["plaudit", "sft"],
        ["plaudit", "reward-model"],
        ["plaudit-reward", "--model"],
        ["plaudit", "ppo"],
        ["plaudit", "evaluate"],
    ]
    for _, name, *flags in (command for command in commands if command[0] == "plaudit"):
        cli.parse(name, flags)


def test_lines_that_show_defaults_load_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = written(write_reviews(tmp_path / "reviews.csv"), capsys)
    text = file.read_text()
    shown = text.split("stages:\n")[1].replace("    # ", "    ").replace("    #   ", "      ")
    file.write_text("stages:\n" + shown)
    assert files.load(PPOConfig, file).ppo.learning_rate == 1e-4
    assert files.load(SFTConfig, file).optimizer.epochs == 1
    assert files.load(RewardModelConfig, file).label_map == ("1=NEGATIVE", "5=POSITIVE")
    assert files.load(EvaluateConfig, file).n_prompts == 256


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"messages": [TALK] * 40},
            {"sft.messages_column": "messages", "ppo.prompts.messages_column": "messages"},
        ),
        (
            {"question": TEXTS, "answer": TEXTS},
            {
                "sft.prompt_column": "question",
                "sft.completion_column": "answer",
                "ppo.prompts.column": "question",
                "ppo.prompts.fields": ["answer"],
                "ppo.reward.function": "reward.py:score",
            },
        ),
        (
            {"prompt": TEXTS, "chosen": ["yes"] * 40, "rejected": ["no"] * 40},
            {"reward-model.kind": "pairwise", "sft.completion_column": "chosen", "ppo.prompts.column": "prompt"},
        ),
        ({"text": TEXTS, "kind": ["toxic", "clean"] * 20}, {"reward-model.label_names": ["clean", "toxic"]}),
        ({"text": ["yes: no # 'x'"] * 40}, {"sft.dataset.text_column": "text"}),
    ],
)
def test_other_data_give_a_file_that_loads(
    columns: dict[str, list[Any]], expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, said = written(write_jsonl(tmp_path / "data: 1 #.jsonl", **columns), capsys)
    stages = yaml.safe_load(file.read_text())["stages"]
    for dotted, value in expected.items():
        found = stages
        for name in dotted.split("."):
            found = found[name]
        assert found == value
    assert ("reward-model" in stages) == ("plaudit reward-model" in said)
    for config_type in (SFTConfig, PPOConfig, EvaluateConfig):
        assert files.load(config_type, file).dataset.data == str(tmp_path / "data: 1 #.jsonl")  # type: ignore[attr-defined]


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    path = write_reviews(tmp_path / "reviews.csv")
    assert cli.run(["init", str(path), "--output", str(tmp_path / "mine.yaml")]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "mine.yaml exists and is not overwritten: give another --output" in line
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_data_without_texts_are_told_so(tmp_path: Path) -> None:
    with (tmp_path / "numbers.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "m"], *([i % 2, i % 3] for i in range(40))])
    config = InitConfig(str(tmp_path / "numbers.csv"), tmp_path / "out.yaml")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ConfigError, match="no column of texts or conversations among none"):
        init.run(InitConfig(str(tmp_path / "empty.csv"), config.output))
    assert not config.output.exists()


def test_a_file_of_stages_without_this_one_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("stages: {sft: {model: gpt2}}\n")
    assert files.load(SFTConfig, file).model == "gpt2"
    with pytest.raises(ConfigError, match=r"its stages are sft, and none of them is for this command \(ppo\)"):
        files.load(PPOConfig, file)
    file.write_text("stages: {sft: {modle: gpt2}}\n")
    with pytest.raises(
        ConfigError, match=r"some\.yaml, stages\.sft: modle='gpt2': no such setting; did you mean model"
    ):
        files.load(SFTConfig, file)
