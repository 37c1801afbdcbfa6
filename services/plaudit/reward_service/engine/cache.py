"""A least-recently-used cache of scores. Off by default; used only by the event loop."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from plaudit.reward_service.engine.batching import Chat, Logits, Scored, Scorer, Text


@dataclass(frozen=True, slots=True)
class CachedScore:
    """One text's logits, whether it was truncated, and its length in tokens."""

    logits: Logits
    truncated: bool
    length: int


class ScoreCache:
    """At most `capacity` scores, by model revision and text. Keys are digests, so long texts take no more memory."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._scores: OrderedDict[bytes, CachedScore] = OrderedDict()

    def lookup(self, scorer: Scorer, texts: Sequence[Text]) -> list[CachedScore | None]:
        """The score of each text, or None where the cache has none from this model."""
        found = []
        for text in texts:
            key = _key(scorer.revision, text)
            score = self._scores.get(key)
            if score is not None:
                self._scores.move_to_end(key)
            found.append(score)
        return found

    def keep(self, texts: Sequence[Text], scored: Scored) -> None:
        """Add the scores of these texts, and evict the least recently used beyond the capacity."""
        truncated = set(scored.truncated)
        for index, text in enumerate(texts):
            key = _key(scored.scorer.revision, text)
            self._scores[key] = CachedScore(scored.logits[index], index in truncated, scored.lengths[index])
            self._scores.move_to_end(key)
        while len(self._scores) > self._capacity:
            self._scores.popitem(last=False)


def _key(revision: str, text: Text) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(text, Chat):
        digest.update(f"{revision}\0{len(text.turns)} turns\0".encode())
        for role, content in text.turns:
            digest.update(f"{len(role)}\0{len(content)}\0{role}{content}".encode())
        return digest.digest()
    first, second = text
    # The length of the first part keeps ("ab", "c") and ("a", "bc") apart.
    digest.update(f"{revision}\0{len(first)}\0{second is None}\0".encode())
    digest.update(first.encode())
    digest.update((second or "").encode())
    return digest.digest()
