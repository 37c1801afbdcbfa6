"""A reward function named by its file."""

import sys
from pathlib import Path

import pytest

from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, function
from plaudit.rewards.settings import RewardSettings


def write(directory: Path, text: str, name: str = "mine.py") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    return directory / name


def test_a_file_anywhere_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # which restores sys.path afterwards
    write(tmp_path / "rewards", "LENGTHS = len\n", "beside.py")
    file = write(
        tmp_path / "rewards",
        "from beside import LENGTHS\ndef score(prompts, responses):\n    return [float(LENGTHS(r)) for r in responses]",
    )
    with RewardClient(RewardSettings.of(function=f"{file}:score")) as client:
        client.connect()
        assert client.score(["a", "b"], ["one", "three"]) == [3.0, 5.0]
        before = client.revision
    assert before.startswith("function:")
    file.write_text(file.read_text() + "\n# changed\n")
    with RewardClient(RewardSettings.of(function=f"{file}:score")) as client:
        client.connect()
        assert client.revision != before


def test_a_relative_file_and_one_called_like_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write(tmp_path / "sub", "def score(prompts, responses):\n    return [1.0] * len(responses)\n", "json.py")
    json = sys.modules["json"]
    assert function.load("sub/json.py:score")(["a"], ["b"]) == [1.0]
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("text", "named", "says"),
    [
        (None, "mine.py:score", "no such file"),
        ("score = 1", "mine.py:score", "is not a function"),
        ("", "mine.py:score", "no attribute 'score'"),
        ("def score(:", "mine.py:score", "invalid syntax"),
        ("import a_module_that_is_not_there", "mine.py:score", "No module named 'a_module_that_is_not_there'"),
    ],
)
def test_a_file_without_the_function_is_refused_with_the_reason(
    text: str | None, named: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as error:
        function.load(named)
    assert "reward.function='mine.py:score'" in str(error.value)


@pytest.mark.parametrize("named", ["mine.py", "mine.py:", ":score", "mine.py:not a name"])
def test_a_name_without_both_parts_is_refused_when_built(named: str) -> None:
    with pytest.raises(ConfigError, match=r"must be file\.py:name or module:name"):
        RewardSettings.of(function=named)
