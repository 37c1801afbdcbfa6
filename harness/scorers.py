"""A scorer without a model: the first logit is a text's length in characters, and a test decides when it runs."""

import threading
from collections.abc import Sequence

from plaudit.reward_service.engine.batching import Encoded, Logits, ScorerLostError, Text, parts_of


class FakeScorer:
    """Logits are (characters, -characters). `open()` the gate to let batches run; poison words make them fail."""

    def __init__(
        self, *, labels: Sequence[str] = ("LENGTH", "MINUS"), packed: bool = False, held: bool = False
    ) -> None:
        self.id = "fake"
        self.revision = "sha256:fake"
        self.labels = tuple(labels)
        self.max_tokens = 512
        self.dtype = "fp32"
        self.packed = packed
        self.replicas = 1
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        """Released once for each batch that reaches the model."""
        self._gate = threading.Event()
        if not held:
            self._gate.set()

    def open(self) -> None:
        """Let batches run."""
        self._gate.set()

    def hold(self) -> None:
        """Let no batch run until `open`."""
        self._gate.clear()

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        return [Encoded([ord(character) for part in parts_of(text) for character in part]) for text in texts]

    def score(self, batch: Sequence[Encoded], replica: int) -> list[Logits]:
        self.batches.append([len(encoded.ids) for encoded in batch])
        self.entered.release()
        assert self._gate.wait(30)
        texts = ["".join(map(chr, encoded.ids)) for encoded in batch]
        if any("lost" in text for text in texts):
            raise ScorerLostError("device gone")
        if any("poison" in text for text in texts):
            raise RuntimeError("poisoned batch")
        rows = [float("nan") if "nan" in text else float(len(text)) for text in texts]
        return [(row, -row)[: len(self.labels)] for row in rows]
