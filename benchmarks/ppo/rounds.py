"""Runs the contestants of `benchmarks.ppo.step` in turns, and compares what they print.

Failure modes: a comparison with another version than it names; a warm-up or a busy minute that only one of two had.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHASES = ("generate", "reward", "evaluate", "update", "step")
Steps = list[dict[str, float]]
"""What the steps of one turn printed."""
Turns = list[Steps]
"""One for each round."""


@dataclass(frozen=True)
class Contestant:
    """A program that prints a JSON line for each step."""

    name: str
    python: str
    module: str
    flags: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    """Names of those whose speed this one's is divided by."""


def require_trl(python: str, version: str, flag: str, module: str) -> None:
    """Exits if the environment of this Python hasn't this version of TRL."""
    asked = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
    how = f"the docstring of {module} says how to make an environment with trl {version}"
    try:
        answer = subprocess.run(asked, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{flag} {python} can't be run ({error.strerror}): {how}")
    if answer.returncode != 0:
        sys.exit(f"{flag} {python} has no trl: {how}")
    if answer.stdout.strip() != version:
        sys.exit(f"{flag} {python} has trl {answer.stdout.strip()}: {how}")


def turn(contestant: Contestant) -> Steps:
    """The steps of one turn. Exits with the program's last words if it fails."""
    command = [contestant.python, "-m", contestant.module, *contestant.flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    steps = steps_of(done.stdout)
    if done.returncode != 0 or not steps:
        sys.exit(f"{contestant.name} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    return counted(steps)


def steps_of(output: str) -> Steps:
    """The JSON lines of a program's output; trainers print other lines between them, Python dicts included."""
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"')]


def counted(steps: Steps) -> Steps:
    """The steps of one turn without the first of several, which is a warm-up."""
    return steps[1:] or steps


def median(turns: Turns) -> dict[str, float]:
    """Phase by phase over the steps of all rounds; of peaks the largest."""
    steps = [step for turn in turns for step in turn]
    return {
        name: (max if name.endswith("peak_mib") else statistics.median)([step[name] for step in steps])
        for name in steps[0]
    }


def table(rounds: Mapping[str, Turns]) -> Iterator[str]:
    """Markdown: seconds a phase, processor time, response tokens, speed and memory of each contestant."""
    yield f"| seconds | {' | '.join(PHASES)} | processor | tokens | samples/s | peak MiB |"
    yield f"| --- |{' ---: |' * (len(PHASES) + 4)}"
    for name, turns in rounds.items():
        step = median(turns)
        seconds = " | ".join(f"{step[phase]:.3f}" for phase in (*PHASES, "processor"))
        service = f" + {step['service_peak_mib']:.0f}" if "service_peak_mib" in step else ""
        speed, peak = f"{step['samples'] / step['step']:.1f}", f"{step['peak_mib']:.0f}{service}"
        yield f"| {name} | {seconds} | {step['tokens']:.0f} | {speed} | {peak} |"


def ratios(turns: Turns, other: Turns, clock: str) -> list[float]:
    """How many times as many samples a second of `clock` the first has as the other, round by round."""

    def seconds_a_sample(steps: Steps) -> float:
        return statistics.median(step[clock] / step["samples"] for step in steps)

    return [seconds_a_sample(theirs) / seconds_a_sample(own) for own, theirs in zip(turns, other, strict=True)]


def ratio_table(contestants: Sequence[Contestant], rounds: Mapping[str, Turns]) -> Iterator[str]:
    """Markdown: each contestant's speed over that of each of its rivals, the median of the rounds and every round."""
    yield "| samples/s | over those of | ratio | by processor time |"
    yield "| --- | --- | ---: | ---: |"
    for contestant in contestants:
        for rival in contestant.rivals:
            cells = []
            for clock in ("step", "processor"):
                each = ratios(rounds[contestant.name], rounds[rival], clock)
                cells.append(f"**{statistics.median(each):.2f}** ({', '.join(f'{ratio:.2f}' for ratio in each)})")
            yield f"| {contestant.name} | {rival} | {' | '.join(cells)} |"
