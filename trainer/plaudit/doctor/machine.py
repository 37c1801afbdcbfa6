"""Cores, threads, memory and disk space; and what a preset needs of the last two."""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from plaudit import demo_models
from plaudit.doctor.findings import Finding, note, ok, wrong
from plaudit.settings import files
from plaudit.settings.ppo import PPOConfig

GIB = 2**30
LEAST_DISK_GIB = 1.0
LEAST_MEMORY_GIB = 2.0
CGROUP = Path("/sys/fs/cgroup")


def check_machine(output_dir: Path, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Threads against cores, free memory, free disk space."""
    yield _threads(cores(), environment.get("OMP_NUM_THREADS"))
    memory = free_memory()
    if memory is None:
        yield note("memory", "this system doesn't say how much is free")
    elif memory < LEAST_MEMORY_GIB * GIB:
        yield wrong(
            "memory",
            f"{memory / GIB:.1f} GiB free, and importing torch and transformers alone takes about 1 GiB",
            "end other programs, or raise the container's limit",
        )
    else:
        yield ok("memory", f"{memory / GIB:.1f} GiB free")
    place, free = free_disk(output_dir)
    if free < LEAST_DISK_GIB * GIB:
        yield wrong(
            "disk",
            f"{free / GIB:.2f} GiB free at {place}",
            "make room there, or give another --output-dir",
        )
    else:
        yield ok("disk", f"{free / GIB:.1f} GiB free at {place}")


def _threads(count: float, asked: str | None) -> Finding:
    shown = f"{count:g} cores"
    if asked is None:
        if count < (os.cpu_count() or 1):
            return wrong(
                "threads",
                f"this process may use {shown} of {os.cpu_count()}; libraries that count all of them start too many "
                "threads",
                f"export OMP_NUM_THREADS={max(1, int(count))}",
            )
        return ok("threads", shown)
    first = asked.split(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        return wrong("threads", f"OMP_NUM_THREADS={asked} is no number of threads", "unset OMP_NUM_THREADS")
    if int(first) > max(1.0, count):
        return wrong(
            "threads",
            f"OMP_NUM_THREADS={first} is more than {shown}: the threads wait for each other",
            f"export OMP_NUM_THREADS={max(1, int(count))}",
        )
    return ok("threads", f"OMP_NUM_THREADS={first} on {shown}")


def cores() -> float:
    """The cores that this process may use: its affinity, and a container's share."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return min(float(affinity), int(quota) / int(period))
    except (OSError, ValueError):
        return float(affinity)


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping: the system's, or a container's if that is less."""
    free = None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            left = int(limit) - int((CGROUP / "memory.current").read_text(encoding="utf-8"))
            free = left if free is None else min(free, left)
    except (OSError, ValueError):
        pass
    return free


def free_disk(directory: Path) -> tuple[Path, int]:
    """The nearest directory that exists, and the bytes free there for this user."""
    place = next(parent for parent in (directory, *directory.absolute().parents) if parent.is_dir())
    return place, shutil.disk_usage(place).free


def check_preset(path: Path, output_dir: Path) -> Iterator[Finding]:
    """The weights, gradients and checkpoints of a PPO run against free memory and disk. Activations come on top."""
    config = files.load(PPOConfig, path)
    parameters = parameters_of(Path(demo_models.resolve(config.policy)))
    if parameters is None:
        yield note("preset", f"{path}: policy={config.policy!r} is not a local model, so its size is not known here")
        return
    adapters = config.lora.enabled
    # Full training: weights, a frozen reference, gradients, two moments of Adam, all of 4 bytes.
    memory = parameters * 4 * (1 if adapters else 5)
    # A checkpoint has the trained parameters and Adam's moments. One more exists while it is written.
    checkpoint = parameters * 12 * (0.02 if adapters else 1)
    disk = checkpoint * (config.keep_checkpoints + 1) + parameters * 4 * (config.merge or not adapters)
    place, free = free_disk(output_dir)
    available = free_memory()
    what = f"{path}: a policy of {parameters / 1e6:.1f} million parameters"
    if available is not None and memory > available:
        yield wrong(
            "preset",
            f"{what} takes at least {memory / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are free",
            "a smaller --policy, adapters (--lora.enabled), or a GPU with --model.quantization 4bit",
        )
    elif disk > free:
        yield wrong(
            "preset",
            f"{what} takes about {disk / GIB:.1f} GiB on disk, and {free / GIB:.2f} GiB are free at {place}",
            "make room, another --output-dir, or --keep-checkpoints 1",
        )
    else:
        yield ok(
            "preset",
            f"{what} takes at least {memory / GIB:.2f} GiB of memory and about {disk / GIB:.2f} GiB on disk; both are "
            "there (`plaudit ppo --check` measures a step)",
        )


def parameters_of(directory: Path) -> int | None:
    """The number of weights in a model directory, from the headers of its safetensors files; None without any."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                total += size
    return total or None
