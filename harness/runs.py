"""What a run wrote, and `plaudit ppo` as processes."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from plaudit import cli
from plaudit.run.metrics import read_metrics
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig

OF_THE_MACHINE = ("time/", "memory/")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["plaudit.cli", "plaudit.stages.loop", "accelerate", "torch.utils.tensorboard"])


def numbers(directory: Path) -> list[dict[str, float]]:
    """The run's metrics, but for the time and memory that things took."""
    return [
        {name: value for name, value in record.items() if not name.startswith(OF_THE_MACHINE)}
        for record in read_metrics(directory / "metrics.jsonl")
    ]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Everything that the run trained."""
    return {
        f"{file.relative_to(directory)}/{name}": tensor
        for file in (*directory.glob("*.safetensors"), *directory.glob("value_model/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same weights, to the bit."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    assert_same(weights(other), weights(one))


def largest_difference(one: Path, other: Path) -> tuple[float, float]:
    """Between two runs' metrics (relative where they are larger than 1) and weights."""
    ours, theirs = numbers(one), numbers(other)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    metrics = max(
        abs(value - theirs[i][name]) / max(1.0, abs(value))
        for i, record in enumerate(ours)
        for name, value in record.items()
    )
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    return metrics, max((expected[name] - got[name]).abs().max().item() for name in expected)


class TrainerProcess:
    """`plaudit ppo` as a process, forked from one that has imported it: it starts at once, and is as real."""

    def __init__(
        self,
        config: Any,
        *flags: str,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        command: str = "ppo",
    ) -> None:
        """`before` is called in the process before the command, whose config this is; it must be picklable."""
        self._stderr, stderr = FORKS.Pipe(duplex=False)
        args = [command, "--config", str(preset_of(config)), *flags]
        self.process = FORKS.Process(target=_run, args=(args, environment or {}, before, stderr), daemon=True)
        self.process.start()
        stderr.close()
        self._lines = os.fdopen(os.dup(self._stderr.fileno()), encoding="utf-8")

    def wait_for_step(self, step: int) -> None:
        """Returns when the process says that step `step` is done."""
        self.wait_for_line(f"PPO step {step}/")

    def wait_for_line(self, beginning: str) -> str:
        """Returns the line when the process prints one that begins like that."""
        for line in self._lines:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"the process ended with {self.end()} before it said {beginning!r}")

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, timeout_s: float = 240) -> tuple[int, str]:
        """Waits for its end; exit code and the rest of stderr."""
        self.process.join(timeout_s)
        late = self.process.exitcode is None
        self.process.kill()
        self.process.join()
        with self._lines, self._stderr:
            stderr = self._lines.read()
        assert not late, f"still running after {timeout_s} s: {stderr}"
        assert self.process.exitcode is not None
        return self.process.exitcode, stderr


def preset_of(config: Any) -> Path:
    """The config as a preset file beside the run's directory."""
    preset: Path = config.output_dir.with_suffix(".yaml")
    preset.parent.mkdir(parents=True, exist_ok=True)
    preset.write_text(json.dumps(to_dict(config)))  # JSON is YAML
    return preset


def start_ranks(
    config: PPOConfig,
    count: int,
    *flags: str,
    environment: dict[str, str] | None = None,
    before: Sequence[Callable[[], None] | None] | None = None,
) -> list[TrainerProcess]:
    """The processes of one run, as a launcher starts them but without one that would end the others.

    `before` has something for each of them to do first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    of_all = {**address, **(environment or {})}
    return [
        TrainerProcess(
            config,
            *flags,
            environment={**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            before=before[rank] if before else None,
        )
        for rank in range(count)
    ]


def end_of_the_first_when_the_second(
    fate: signal.Signals, config: PPOConfig, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and stderr of the first of two processes, after the second met its fate in mid-run."""
    config = dataclasses.replace(config, steps=1000, collective_timeout_s=15.0)
    first, second = start_ranks(config, 2, environment=environment)
    first.wait_for_step(1)
    second.signal(fate)
    end = first.end(timeout_s=60)
    second.process.kill()
    second.end()
    return end


def single_threaded(run: Any, *arguments: Any) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(*arguments)
    finally:
        torch.set_num_threads(threads)


def _run(args: list[str], environment: dict[str, str], before: Callable[[], None] | None, stderr: Connection) -> None:
    os.dup2(stderr.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = sys.stderr
    os.environ |= {"OMP_NUM_THREADS": "1", **environment}
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(cli.run(args))
