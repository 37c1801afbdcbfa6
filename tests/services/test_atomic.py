"""Replaced whole or not at all: what the stages' own tests (tests/trainer/stages/test_killed_writes.py) leave open."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import kills
from harness.kills import contents
from plaudit import atomic


def put(directory: Path, what: str = "model", **files: str) -> None:
    """Replaces a result; `_` in a name stands for `.`, and `__` for `/`."""
    with atomic.replacing(directory, what, entries=("config.json",)) as beside:
        for name, text in files.items():
            path = beside / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def interrupted(directory: Path, what: str = "model", **files: str) -> None:
    """The same, killed when the new files count and none has been moved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "finish", lambda directory: False)
        put(directory, what, **files)


def texts(directory: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in contents(directory).items()}


def test_a_kill_while_one_file_is_written_leaves_the_old_text_or_the_new(tmp_path: Path) -> None:
    before, root = tmp_path / "before", tmp_path / "root"
    before.mkdir()
    (before / "run.json").write_text("old")

    def write(root: Path) -> None:
        atomic.write_file(root / "run.json", "new")

    found = [(root / "run.json").read_text() for _ in kills.after_each_kill(write, before, root)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == ("old", "new")
    assert found.count("old") == 5  # before an old temporary file goes, the new one is made, opened, flushed, renamed
    kills.fresh(before, root)
    kills.really_killed(write, root, 2)
    assert (root / "run.json").read_text() == "old"
    write(root)
    assert [path.name for path in root.iterdir()] == ["run.json"]


def test_one_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    atomic.write_file(tmp_path / "private", "secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_what_the_new_result_lacks_goes_and_what_is_not_the_result_stays(tmp_path: Path) -> None:
    put(tmp_path, config_json="1", merges_txt="1", merged__config_json="1")
    put(tmp_path, "evaluation", report_html="1")
    (tmp_path / "metrics.jsonl").write_text("mine")
    put(tmp_path, config_json="2")
    assert texts(tmp_path) == {"config.json": "2", "report.html": "1", "metrics.jsonl": "mine"}
    assert not (tmp_path / "merged").exists()


def test_files_of_a_result_without_a_record_go_by_their_names(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    obsolete = ("model*.safetensors", "*.index.json")
    with atomic.replacing(tmp_path, "model", obsolete=obsolete) as beside:
        (beside / "model.safetensors").write_text("new")
    assert texts(tmp_path) == {"model.safetensors": "new", "notes.txt": "earlier"}


def test_a_version_is_another_after_every_replacement_even_by_the_same_files(tmp_path: Path) -> None:
    versions = [atomic.version(tmp_path, "model")]
    for _ in range(2):
        put(tmp_path, config_json="1")
        versions.append(atomic.version(tmp_path, "model"))
    assert versions[0] is None
    assert len(set(versions)) == 3
    put(tmp_path, "evaluation", report_html="1")
    assert atomic.version(tmp_path, "model") == versions[-1]


def test_an_interrupted_replacement_is_read_through_and_finished_by_the_next_write(tmp_path: Path) -> None:
    put(tmp_path, config_json="1", merges_txt="1")
    interrupted(tmp_path, config_json="2", vocab_json="2")
    assert atomic.is_pending(tmp_path)
    read = [path for pattern in ("*.json", "*.txt") for path in atomic.current_files(tmp_path, pattern)]
    assert {path.name: path.read_text() for path in read} == {"config.json": "2", "vocab.json": "2"}
    put(tmp_path, "evaluation", report_html="1")
    assert texts(tmp_path) == {"config.json": "2", "vocab.json": "2", "report.html": "1"}


def test_a_block_that_fails_leaves_the_old_result_and_no_litter(tmp_path: Path) -> None:
    put(tmp_path, config_json="1")

    def fail() -> None:
        with atomic.replacing(tmp_path, "model") as beside:
            (beside / "config.json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.files", "config.json"]
    assert texts(tmp_path) == {"config.json": "1"}


@pytest.mark.parametrize("name", ["../victim", "/victim", "", 7])
def test_a_plan_that_leads_out_of_its_directory_is_refused(tmp_path: Path, name: object) -> None:
    directory = tmp_path / "run"
    put(directory, config_json="1")
    interrupted(directory, config_json="2")
    plan = directory / atomic.REPLACING / atomic.PLAN
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"remove": [name]}))
    for use in (atomic.finish, lambda directory: atomic.current_files(directory, "*.json")):
        with pytest.raises(OSError, match="no record of a replacement"):
            use(directory)


def test_links_at_the_temporary_names_lead_nowhere(tmp_path: Path) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "keep").write_text("precious")
    directory.mkdir()
    for name in (atomic.WRITING, atomic.REPLACING):
        (directory / name).symlink_to(victim, target_is_directory=True)
    put(directory, config_json="1")
    assert texts(directory) == {"config.json": "1"}
    assert [path.name for path in victim.iterdir()] == ["keep"]


@contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    """What `mount` makes of these arguments, at `place`; skips the test where that can't be had."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs Linux and root")
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("kind", ["bind", "overlay"])
def test_a_mount_point_and_an_overlay_are_replaced_too(tmp_path: Path, kind: str) -> None:
    # As in a container: the earlier result is in the image, or the output directory is a volume.
    earlier, place, changes, work = (tmp_path / name for name in ("earlier", "place", "changes", "work"))
    for directory in (place, changes, work):
        directory.mkdir()
    put(earlier, config_json="1", merged__config_json="1", merges_txt="1")
    arguments = ["--bind", str(earlier)]
    if kind == "overlay":
        if subprocess.run(["mount", "-t", "tmpfs", "layers", str(work)], capture_output=True).returncode != 0:
            pytest.skip("no tmpfs can be mounted here")
        for name in ("upper", "work"):
            (work / name).mkdir()
        layers = f"lowerdir={earlier},upperdir={work / 'upper'},workdir={work / 'work'}"
        arguments = ["-t", "overlay", "layers", "-o", layers]
    try:
        with mounted(place, *arguments):
            interrupted(place, config_json="2", merged__config_json="2")
            assert atomic.finish(place)
            put(place, config_json="3", merged__config_json="3")
            assert texts(place) == {"config.json": "3", "merged/config.json": "3"}
    finally:
        if kind == "overlay":
            subprocess.run(["umount", "--lazy", str(work)], check=True)
