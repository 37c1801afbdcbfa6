"""A failed write names its own reason, and no other error is taken for one."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from plaudit.rewards.errors import Exchange, RewardRejected
from plaudit.run.storage import NotWritten, replaced_files, write_text, writing

UNREACHABLE = ConnectionRefusedError(111, "Connect call failed")


def fail(error: Exception) -> None:
    raise error


def test_the_reason_is_what_the_system_said_about_the_write(tmp_path: Path) -> None:
    def over_torch() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed writing file") from error

    with pytest.raises(NotWritten, match=f"cannot write {tmp_path}: No space left on device; "), writing(tmp_path):
        over_torch()


def test_what_went_wrong_before_the_write_is_not_its_reason(tmp_path: Path) -> None:
    try:
        raise UNREACHABLE
    except OSError:
        with pytest.raises(NotWritten, match="Permission denied"), writing(tmp_path):
            fail(SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"))
        with pytest.raises(RuntimeError, match="CUDA error"), writing(tmp_path):
            fail(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_refusal_is_told_also_when_its_exchange_finds_no_place(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    rejected = RewardRejected("401: send a valid key", Exchange("POST", "http://judge/v1/rewards", "{}", 401))
    rejected.leave_in(file / "run")
    assert rejected.__notes__ == [f"the request and the answer could not be written to {file / 'run'}: Not a directory"]


def test_a_link_at_a_temporary_name_leads_nowhere(tmp_path: Path) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "vd"
    victim.write_text("precious")
    directory.mkdir()
    (directory / "keep").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.writing").symlink_to(victim)
    write_text(out / "run.json", "ours")
    assert victim.read_text() == "precious"
    assert (out / "run.json").read_text() == "ours"
    assert not (out / "run.json").is_symlink()
    (out / ".writing").symlink_to(directory, target_is_directory=True)
    with replaced_files(out, "thing") as beside:
        (beside / "a").write_text("x")
    assert (out / "a").read_text() == "x"
    assert [path.name for path in directory.iterdir()] == ["keep"]
