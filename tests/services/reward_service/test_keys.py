"""Keys: what counts as one, what is done when a file changes, and who may reload."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.scorers import FakeScorer
from plaudit.reward_service import keys as keys_module
from plaudit.reward_service.__main__ import api_keys, parse_settings
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.keys import KeyFileError, Keys
from plaudit.serving.listening import StartError


@pytest.fixture
def log() -> list[tuple[str, dict[str, object]]]:
    return []


def keys_of(file: Path, log: list[Any], **more: Any) -> Keys:
    return Keys(file=file, log=lambda event, **details: log.append((event, details)), **more)


def write(file: Path, text: str) -> None:
    beside = file.with_suffix(".new")
    beside.write_text(text)
    beside.chmod(0o600)
    beside.replace(file)


def right(keys: Keys, key: str) -> bool:
    return keys.authenticate(f"Bearer {key}".encode()) is not None


def test_comments_and_empty_lines_are_no_keys(tmp_path: Path, log: list[Any]) -> None:
    write(tmp_path / "keys", "# rotated 2026\n\n  one  \n#two\n")
    keys = keys_of(tmp_path / "keys", log)
    assert right(keys, "one")
    assert not any(right(keys, wrong) for wrong in ("# rotated 2026", "#two", "two", ""))


def test_a_line_end_in_the_variable_is_no_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_API_KEY", "secret\n")
    assert api_keys(parse_settings(["--model", "m"])) == ["secret"]


@pytest.mark.parametrize("key", ["schlüssel", "tab\there"])
def test_a_key_that_no_header_can_carry_is_refused_at_the_start(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_API_KEY", key)
    with pytest.raises(StartError, match="REWARD_API_KEY holds a key with a control character"):
        api_keys(parse_settings(["--model", "m"]))


def test_a_key_that_is_taken_out_of_the_file_is_refused_without_a_restart(
    tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "REFRESH_S", -1.0)
    write(tmp_path / "keys", "old\nkept\n")
    keys = keys_of(tmp_path / "keys", log)
    assert right(keys, "old")
    write(tmp_path / "keys", "kept\nnew\n")
    assert [right(keys, key) for key in ("old", "kept", "new")] == [False, True, True]
    assert log == [("keys-read", {"file": str(tmp_path / "keys"), "keys": 2})]


def test_a_file_that_cannot_be_used_for_a_while_changes_nothing_and_is_told_once(
    tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "REFRESH_S", -1.0)
    write(tmp_path / "keys", "one\n")
    keys = keys_of(tmp_path / "keys", log)
    (tmp_path / "keys").unlink()
    assert [right(keys, "one") for _ in range(3)] == [True] * 3
    assert [event for event, _ in log] == ["keys-failed"]
    assert "the keys from before stay valid" in log[0][1]["detail"]


def test_a_key_file_that_all_may_read_gets_a_warning(tmp_path: Path, log: list[Any]) -> None:
    write(tmp_path / "keys", "one\n")
    keys_of(tmp_path / "keys", log)
    assert log == []
    (tmp_path / "keys").chmod(0o644)
    keys_of(tmp_path / "keys", log)
    assert [(event, details["mode"]) for event, details in log] == [("key-file-readable", "0644")]


def test_a_key_file_that_is_not_there_is_an_error(tmp_path: Path, log: list[Any]) -> None:
    with pytest.raises(KeyFileError, match=r"--api-key-file .* can't be read"):
        keys_of(tmp_path / "none", log)
    write(tmp_path / "keys", "# nothing\n")
    with pytest.raises(KeyFileError, match="holds no key; write one on each line"):
        keys_of(tmp_path / "keys", log)


@pytest.mark.parametrize(
    ("keys", "presented", "status"),
    [
        (Keys(["one"], admin_keys=["boss"]), "one", 403),
        (Keys(["one"], admin_keys=["boss"]), "boss", 200),
        (Keys(["one"]), "one", 403),
        (Keys(admin_keys=["boss"]), None, 401),
        (Keys(), None, 200),
    ],
)
def test_a_reload_wants_an_administrators_key(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any], keys: Keys, presented: str | None, status: int
) -> None:
    async def run() -> httpx.Response:
        async with client_of(make_engine(), api_keys=keys, reload=FakeScorer) as http:
            headers = {} if presented is None else {"authorization": f"Bearer {presented}"}
            return await http.post("/v1/model:reload", headers=headers)

    assert asyncio.run(run()).status_code == status


def test_the_ready_file_on_a_full_disk_is_one_clear_line(classifier_dir: Path, tmp_path: Path) -> None:

    command = [sys.executable, "-m", "plaudit.reward_service", "--model", str(classifier_dir), "--port", "0"]
    done = subprocess.run(
        [*command, "--ready-file", str(tmp_path / "no" / "such" / "place")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "can't be written (No such file or directory): free space, or name another file" in line
