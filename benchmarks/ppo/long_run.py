"""Start-up, and whether a long run stays as fast and as small as it began.

    python -m benchmarks.ppo.long_run --steps 200

Starts the reward service with the embedded classifier, then `plaudit ppo` with the demo's preset as a process of its
own, and prints how long it takes to the end of the first step, and the time of a step and the memory of both processes
in each fifth of the run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from plaudit.run.metrics import FILE_NAME
from plaudit.run.service_process import reward_service

PRESET = "presets/demo.yaml"
REWARD_MODEL = "models/imdb-distilbert-mini"
PARTS = 5


def steps_in(file: Path) -> list[dict[str, float]]:
    """The complete lines of a file that is being written."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def seconds_of_help() -> float:
    """The best of three: the first may read the disk."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "plaudit.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print(f"plaudit --help: {seconds_of_help():.2f} s")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with reward_service(REWARD_MODEL, directory / "service", ready_timeout_s=120.0) as url:
            (service,) = psutil.Process().children()
            run(url, service, directory / "run", arguments.steps)


def run(url: str, service: psutil.Process, directory: Path, steps: int) -> None:
    """Trains, watches, prints."""
    command = [sys.executable, "-m", "plaudit.cli", "ppo", "--config", PRESET]
    command += ["--reward.url", url, "--output-dir", str(directory), "--steps", str(steps)]
    began = time.perf_counter()
    trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    service_mib: list[float] = []
    while trainer.poll() is None:
        done = steps_in(directory / FILE_NAME)
        if len(done) > len(service_mib):
            if not service_mib:
                print(f"plaudit ppo to the end of its first step: {time.perf_counter() - began:.1f} s\n", flush=True)
            service_mib += [service.memory_info().rss / 2**20] * (len(done) - len(service_mib))
        time.sleep(0.05)
    if trainer.returncode != 0:
        sys.exit(f"plaudit ppo ended with code {trainer.returncode}")
    done = steps_in(directory / FILE_NAME)
    service_mib += [service_mib[-1]] * (len(done) - len(service_mib))
    print(
        "| steps | seconds a step, median | trainer's peak, MiB | reward service, MiB |\n| --- | ---: | ---: | ---: |"
    )
    for part in range(PARTS):
        rows = slice(part * steps // PARTS, (part + 1) * steps // PARTS)
        seconds = statistics.median(step["time/step_s"] for step in done[rows])
        peak = max(step["memory/update_peak_mib"] for step in done[rows])
        judge = statistics.median(service_mib[rows])
        print(f"| {rows.start + 1} to {rows.stop} | {seconds:.3f} | {peak:.0f} | {judge:.0f} |")


if __name__ == "__main__":
    main()
