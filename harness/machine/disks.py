"""A real file system that is small enough to be filled."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size_kib: int) -> Iterator[Path]:
    """A tmpfs of this size at `place` for the length of the block; skips the test where none can be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs Linux and root")
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "plaudit-test", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, *, but_kib: int = 0) -> Path:
    """Takes all the room on the disk but this much; deleting the file that is returned gives it back."""
    state = os.statvfs(disk)
    filler = disk / "filler"
    # The file system's own count may be a little too high.
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for _ in range(state.f_bavail * state.f_frsize // 1024 - but_kib):
            file.write(bytes(1024))
    return filler
