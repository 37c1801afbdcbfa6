"""What becomes of a PPO run and of its rewards when servers and cables fail.

    OMP_NUM_THREADS=1 python -m benchmarks.chaos.faults

For every fault of harness/chaos.py, `plaudit ppo` runs as a process against servers that are processes; what
stops it is put right, and the run resumed. Prints a Markdown table: rewards that the undisturbed run's updates are made
of (asked), the same ones that entered an update here (got), and any others that did (invented). Exits 1 unless nothing
was lost or invented, the exit codes are the documented ones, and every run ended with the undisturbed weights.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from harness import chaos
from harness.chaos import CABLES, FAULTS, KILLS, REAL_KILLS, Account, Replicas, Trial
from harness.machine.network import why_not

Play = Callable[[], Account]


def plays(stack: ExitStack) -> Iterator[tuple[str, int, Play]]:
    """Name, expected exit code, and what does it."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    with chaos.stubs(1) as (server,):
        trial = Trial(directory / "stand-ins", server.url)
    for fault in FAULTS:
        yield fault.name, fault.exit_code, functools.partial(chaos.with_fault, trial, fault)
    for name, (code, play) in KILLS.items():
        yield name, code, functools.partial(play, trial)
    if (reason := why_not()) is None:
        for name, (code, play) in CABLES.items():
            yield name, code, functools.partial(play, trial)
    else:
        print(f"no network namespaces: {reason}", file=sys.stderr)
    (directory / "services").mkdir()
    replicas = Replicas(directory / "services")
    stack.callback(replicas.kill)
    for name, (code, disturb) in REAL_KILLS.items():
        replicas.restart()
        yield name, code, functools.partial(disturb, replicas)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| fault | what the trainer said | exit | asked | got | lost | invented |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    wrong = 0
    with ExitStack() as stack:
        for name, expected, play in plays(stack):
            if arguments.only not in name:
                continue
            began = time.monotonic()
            account = play()
            codes = ", resumed ".join(map(str, account.exit_codes))
            numbers = (account.asked, account.got, account.lost, account.invented)
            said = account.said.replace("|", "\\|") or "nothing"
            print(f"| {name} | {said} | {codes} | {' | '.join(map(str, numbers))} |", flush=True)
            print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
            right = account.exit_codes == ([expected, 0] if expected else [0]) and account.same_weights
            wrong += not (right and account.lost == account.invented == 0)
    print(f"\n{wrong} runs differ from the undisturbed one or from the documented exit code.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
