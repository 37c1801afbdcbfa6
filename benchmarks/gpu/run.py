"""Everything worth knowing about a GPU, in one run of less than nine minutes.

    make gpu-bundle
    python -m benchmarks.gpu.run --out OUT

The parts come in order of worth. Each has a process and a time limit of its own, and its rows are in OUT/PART.json as
soon as they are there: whatever is cut short leaves what was done. `--tiny` runs the same code with tiny models, on the
CPU too. `benchmarks.gpu.render` turns the files into tables.

Failure modes: a run hangs, or a part ends and leaves a process on the card.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import FORKS, Results, Setting, end_all, end_with_parent, make_models, said

PARTS = {
    "right": 100.0,
    "epoch": 140.0,
    "where": 60.0,
    "service": 130.0,
    "size": 75.0,
    "two": 30.0,
}
"""Seconds each part may take; 535 together, and the first three five minutes."""
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the result files go")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: does the code run at all?")
    parser.add_argument("--device", help="cuda or cpu; the GPU if there is one")
    parser.add_argument("--bundle", type=Path, default=Path(".gpu-bundle"))
    parser.add_argument("--limit-factor", type=float, default=1.0, help="multiplies every part's time limit")
    parser.add_argument(
        "--no-forks", action="store_true", help="a new interpreter for each part; chosen by itself where forks fail"
    )
    arguments = parser.parse_args()
    if not arguments.tiny and not (arguments.bundle / "prompts.jsonl").is_file():
        sys.exit(f"{arguments.bundle} holds no prompts: run `make gpu-bundle` first, or give --tiny")
    began = time.monotonic()
    _adopt_orphans()
    # What this process started must not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment()
    device = arguments.device or ("cuda" if _has_gpu() else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        try:
            imported = import_all()
            setting = Setting(device, arguments.tiny, arguments.out.resolve(), Path(work), arguments.bundle.resolve())
            apart = not arguments.no_forks and (not setting.on_gpu or _forks_can_use(device))
            setting = dataclasses.replace(setting, apart=apart)
            machine = Results(setting.out / "machine.json", "machine")
            machine.add("machine", device=device, tiny=setting.tiny, imports_s=imported, forks=apart, **software())
            print(f"imports {imported:.1f} s, on {device}", flush=True)
            models = FORKS.Process(target=_logged, args=(setting, "models", make_models))
            models.start()
            for part in [name for name in PARTS if name in (arguments.only or PARTS)]:
                state, seconds = run_part(setting, part, PARTS[part] * arguments.limit_factor)
                machine.add("parts", part=part, state=state, seconds=round(seconds, 1))
                print(f"== {part}: {state}, {seconds:.1f} s (limit {PARTS[part] * arguments.limit_factor:.0f})")
                sys.stdout.flush()
            machine.end()
        finally:
            end_all(os.getpid(), itself=False)
            for unfinished in arguments.out.glob("*.part"):
                unfinished.unlink()
    print(f"all in {time.monotonic() - began:.1f} s, in {arguments.out}")


def environment() -> None:
    """Of this process and all that it starts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Asking whether there is a GPU must not open it: a process that has, can't be forked.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def import_all() -> float:
    """What all parts need, once: they are forked from this process. The seconds it took."""
    began = time.perf_counter()
    for name in ("torch", "transformers", "peft", "plaudit.stages.ppo", "plaudit.rewards.client", "psutil"):
        importlib.import_module(name)
    return round(time.perf_counter() - began, 1)


def software() -> dict[str, Any]:
    import torch
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": len(os.sched_getaffinity(0)),
    }
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        name, memory, driver = (cell.strip() for cell in said.splitlines()[0].split(","))
        found |= {"card": name, "card_memory": memory, "driver": driver, "cuda": torch.version.cuda}
    except (OSError, subprocess.SubprocessError, ValueError):
        found |= {"card": "none"}
    return found


def run_part(setting: Setting, part: str, limit_s: float) -> tuple[str, float]:
    """How it ended, and after how many seconds. Nothing of it is left running."""
    began = time.monotonic()
    # A little less than the limit, so that a part can say itself what it left out.
    setting = dataclasses.replace(setting, deadline=began + 0.95 * limit_s)
    if setting.apart:
        process = FORKS.Process(target=_logged, args=(setting, part, _part))
        process.start()
        process.join(limit_s)
        code = process.exitcode
        assert process.pid is not None
        end_all(process.pid)
        process.join(5)
    else:
        code = _in_a_new_interpreter(setting, part, limit_s)
    # And those whose parents have gone before them.
    _end_orphans(setting)
    state = "cut short" if code is None else f"failed ({code})"
    if code == 0:
        state = json.loads((setting.out / f"{part}.json").read_text())["state"]
    return state, time.monotonic() - began


def _in_a_new_interpreter(setting: Setting, part: str, limit_s: float) -> int | None:
    code = "import sys; from benchmarks.gpu import run; run.from_text(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(dataclasses.asdict(setting), default=str), part])
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_all(process.pid)


def from_text(text: str, part: str) -> None:
    """A part in an interpreter of its own, for machines where forks can't use the card."""
    environment()
    import_all()
    given = json.loads(text)
    places = {name: Path(given[name]) for name in ("out", "work", "bundle")}
    _logged(Setting(**{**given, **places}), part, _part)


def _logged(setting: Setting, name: str, work: Callable[..., Any]) -> None:
    """In a process of its own, whose output goes to the log."""
    with (setting.out / "run.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    code = 0
    try:
        work(setting) if work is make_models else work(setting, name)
    except BaseException as error:
        traceback.print_exc()
        code = 1
        if work is _part:
            _leave_the_error(setting.out / f"{name}.json", error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _part(setting: Setting, part: str) -> None:
    results = Results(setting.out / f"{part}.json", part)
    importlib.import_module(f"benchmarks.gpu.{part}").measure(setting, results)
    results.end()


def _leave_the_error(path: Path, error: BaseException) -> None:
    if path.is_file():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"state": f"failed: {said(error)}"}, indent=1))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _forks_can_use(device: str) -> bool:
    process = FORKS.Process(target=_use, args=(device,))
    process.start()
    process.join(60)
    fine = process.exitcode == 0
    assert process.pid is not None
    end_all(process.pid)
    return fine


def _use(device: str) -> None:
    import torch

    try:
        torch.ones(1, device=device).item()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _adopt_orphans() -> None:
    """Processes whose parents end become this one's children (Linux), so that they are found and ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_orphans(setting: Setting) -> None:
    """Everything below this process but the one that makes models."""
    import psutil

    if not (setting.work / "models-made").exists() and not (setting.work / "models-failed").exists():
        return
    for child in psutil.Process().children():
        end_all(child.pid)


if __name__ == "__main__":
    main()
