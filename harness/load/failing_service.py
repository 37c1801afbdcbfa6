"""The reward service with a model that fails on its vocabulary's last word, for `harness.load.rewards.poison`.

python -m harness.load.failing_service --model DIRECTORY ...
"""

import sys
from collections.abc import Sequence

from plaudit.reward_service.__main__ import main
from plaudit.reward_service.engine.batching import Encoded, Logits
from plaudit.reward_service.engine.scorer import TransformersScorer

_score = TransformersScorer.score


def _fail_on_the_last_word(scorer: TransformersScorer, batch: Sequence[Encoded], replica: int) -> list[Logits]:
    last = len(scorer.tokenizer) - 1
    if any(last in encoded.ids for encoded in batch):
        raise IndexError("index out of range in self")
    return _score(scorer, batch, replica)


if __name__ == "__main__":
    TransformersScorer.score = _fail_on_the_last_word  # type: ignore[assignment, method-assign]
    sys.exit(main())
