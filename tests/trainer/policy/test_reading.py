"""A model directory is read as one version, whatever happens to it meanwhile."""

from pathlib import Path

import filelock
import pytest

from plaudit import atomic
from plaudit.errors import ConfigError
from plaudit.policy import reading as module
from plaudit.policy.adapters import is_adapters
from plaudit.policy.pretrained import load_causal_lm, load_tokenizer
from plaudit.policy.reading import MODEL, reading, settle


def interrupted(directory: Path, **files: str) -> None:
    """A replacement, killed when the new files count and none has been moved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "finish", lambda directory: False)
        with atomic.replacing(directory, MODEL) as beside:
            for name, text in files.items():
                path = beside / name.replace("__", "/").replace("-", ".")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)


def test_whoever_reads_first_finishes_what_a_kill_left(tmp_path: Path) -> None:
    interrupted(tmp_path, adapter_config="{}", **{"adapter_config-json": "{}"})
    assert not (tmp_path / "adapter_config.json").exists()
    assert is_adapters(tmp_path)
    assert not atomic.is_pending(tmp_path)


def test_a_merged_model_is_finished_from_the_directory_above(tmp_path: Path) -> None:
    interrupted(tmp_path, **{"merged__config-json": "{}"})
    with reading(tmp_path / "merged"):
        assert (tmp_path / "merged" / "config.json").read_text() == "{}"
    with pytest.raises(ConfigError, match="replaced while they were being read"), reading(tmp_path / "merged"):
        interrupted(tmp_path, **{"merged__config-json": "[]"})


def test_one_that_another_process_holds_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, **{"config-json": "{}"})
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    with filelock.FileLock(tmp_path / atomic.LOCK):
        with pytest.raises(ConfigError, match=r"can't be moved from here \(another process holds its lock\)"):
            settle(tmp_path)
        assert atomic.is_pending(tmp_path)
    settle(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_one_that_cannot_be_written_to_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(directory: Path) -> bool:
        raise OSError(30, "Read-only file system")

    interrupted(tmp_path, **{"config-json": "{}"})
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    monkeypatch.setattr(atomic, "finish", read_only)
    with pytest.raises(ConfigError, match=r"\(Read-only file system\): start this command once where"):
        load_causal_lm(tmp_path)


def test_a_file_that_vanishes_because_of_a_replacement_is_told_as_one(policy_dir: Path, tmp_path: Path) -> None:
    def read_while_it_is_replaced() -> None:
        with reading(tmp_path):
            interrupted(tmp_path, **{"notes-txt": "new"})
            load_tokenizer(tmp_path)

    with pytest.raises(ConfigError, match="replaced while they were being read"):
        read_while_it_is_replaced()
    # Without a replacement, the error is the loader's own.
    with pytest.raises(ConfigError, match="a tokenizer that loads"), reading(tmp_path):
        load_tokenizer(tmp_path)
