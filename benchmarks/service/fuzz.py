"""Requests that nobody would send, to the real reward service: none gets 5xx, and each the answer that is documented.

    python -m benchmarks.service.fuzz --requests 120000

The parts are those of harness/load/fuzz.py: `schema`, `texts`, `bytes` and `framing`. Prints how each was answered and
what was wrong, and beside it the service's own count of its answers. Afterwards known texts must get the same rewards
as before, bit by bit, and the service's memory must have grown by no more than `MOST_GROWTH_MIB`. Exits 1 if anything
was wrong or 5xx.
"""

import argparse
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil
from hypothesis.errors import HypothesisWarning

from harness.load.fuzz import PARTS, counted_by_the_service, known_rewards
from harness.load.hostile_requests import FUZZ_KEY
from harness.reward_service import RewardService

SETTLE_S = 4.0
"""How long an idle service takes to give freed memory back."""
MOST_GROWTH_MIB = 64


@dataclass
class Condition:
    """How a service is: what it answers to known texts, and its memory in MiB."""

    rewards: dict[str, float]
    resident_mib: float

    @classmethod
    def of(cls, service: RewardService) -> "Condition":
        rewards = known_rewards(service.url)
        time.sleep(SETTLE_S)
        return cls(rewards, _resident_mib(service.pid))

    def worse_than(self, before: "Condition") -> str | None:
        """What the requests between have done to the service, if anything."""
        changed = sum(self.rewards[text] != before.rewards[text] for text in self.rewards)
        if changed:
            return f"{changed} of {len(self.rewards)} rewards are others than before"
        if self.resident_mib > before.resident_mib + MOST_GROWTH_MIB:
            return f"memory grew by more than {MOST_GROWTH_MIB} MiB"
        return None


def _resident_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/imdb-distilbert-mini"))
    parser.add_argument("--requests", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", HypothesisWarning)
    tallies = []
    wrong = False
    for keyed in (False, True):
        names = [name for name in arguments.parts if PARTS[name].keyed == keyed]
        if not names:
            continue
        # Short texts for the model, so that the time goes into requests; longer ones are cut and say so.
        flags = ("--label", "POSITIVE", "--max-tokens", "64")
        with RewardService(arguments.model, *flags, api_key=FUZZ_KEY if keyed else None) as service:
            before = Condition.of(service)
            for name in names:
                part = PARTS[name]
                tallies.append(part.send(service.url, math.ceil(arguments.requests * part.share), arguments.seed))
                print(f"{name}: {tallies[-1]}", flush=True)
            after = Condition.of(service)
            counts = counted_by_the_service(service.url)
        server_errors = {status: count for status, count in counts.items() if status >= "500" and status != "501"}
        worse = after.worse_than(before)
        wrong |= bool(server_errors or worse)
        print(f"by the service's own count {counts.total()}: {dict(sorted(counts.items()))}")
        print(
            f"afterwards: {worse or f'the same {len(after.rewards)} rewards to the bit'}; "
            f"memory {before.resident_mib:.0f} MiB before, {after.resident_mib:.0f} after",
            flush=True,
        )
    print(f"in all {sum(tally.sent for tally in tallies)}, {sum(tally.server_errors for tally in tallies)} of 5xx")
    sys.exit(wrong or any(tally.wrong or tally.server_errors for tally in tallies))


if __name__ == "__main__":
    main()
