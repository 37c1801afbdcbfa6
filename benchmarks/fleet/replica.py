"""The reward service with a model that takes a set time and no CPU: it sleeps. All else is the real program.

    python -m benchmarks.fleet.replica --model DIRECTORY ...

FLEET_BATCH_S and FLEET_TOKEN_S are the seconds of a batch: FLEET_BATCH_S + tokens x FLEET_TOKEN_S. Both 0 is a model
that costs nothing. The directory's model is loaded, checked and its tokenizer used, so that keys, reload and revisions
are real; its scores are not computed: every reward is 1.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence

from plaudit.reward_service.__main__ import main
from plaudit.reward_service.engine.batching import Encoded, Logits
from plaudit.reward_service.engine.scorer import TransformersScorer

BATCH_S, TOKEN_S = "FLEET_BATCH_S", "FLEET_TOKEN_S"
_score = TransformersScorer.score


def _sleep(scorer: TransformersScorer, batch: Sequence[Encoded], replica: int) -> list[Logits]:
    if not threading.current_thread().name.startswith("score-"):
        return _score(scorer, batch, replica)  # the check at start and at a reload
    began = time.monotonic()
    tokens = sum(len(encoded.ids) for encoded in batch)
    seconds = float(os.environ.get(BATCH_S, "0")) + tokens * float(os.environ.get(TOKEN_S, "0"))
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return [(1.0,) * len(scorer.labels)] * len(batch)


if __name__ == "__main__":
    TransformersScorer.score = _sleep  # type: ignore[assignment, method-assign]
    sys.exit(main())
