"""Requests that nobody would send, to the real reward service: none gets 5xx, and each the answer that is documented.

    python -m benchmarks.service.fuzz --requests 100000

The parts are those of harness/load/fuzz.py: `schema`, `texts`, `bytes` and `framing`. Prints how each was answered and
what was wrong, and beside it the service's own count of its answers. Exits 1 if any answer was wrong or 5xx.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

from hypothesis.errors import HypothesisWarning

from harness.load.fuzz import PARTS, counted_by_the_service
from harness.reward_service import RewardService


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/imdb-distilbert-mini"))
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", HypothesisWarning)
    tallies = []
    # Short texts for the model, so that the time goes into requests; longer ones are cut and say so.
    with RewardService(arguments.model, "--label", "POSITIVE", "--max-tokens", "64") as service:
        for name in arguments.parts:
            part, share = PARTS[name]
            tallies.append(part(service.url, math.ceil(arguments.requests * share), arguments.seed))
            print(f"{name}: {tallies[-1]}", flush=True)
        counts = counted_by_the_service(service.url)
    print(f"in all {sum(tally.sent for tally in tallies)}, {sum(tally.server_errors for tally in tallies)} of 5xx")
    print(f"by the service's own count {counts.total()}: {dict(sorted(counts.items()))}")
    sys.exit(any(tally.wrong or tally.server_errors for tally in tallies))


if __name__ == "__main__":
    main()
