"""The reward service with a model that costs nothing, so that its front end is all there is to measure.

python -m benchmarks.service.null_model PORT
"""

import socket
import sys
from collections.abc import Sequence

from plaudit.reward_service.engine.batching import Encoded, Engine, Logits, Text
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.http.garbage_collection import freeze
from plaudit.reward_service.http.server import Hooks, Server


class NullScorer:
    """Every text is one token and every reward the same."""

    id = "null"
    revision = "0"
    labels = ("NEGATIVE", "POSITIVE")
    max_tokens = 512
    dtype = "fp32"
    packed = True
    replicas = 1

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        return [Encoded((1,)) for _ in texts]

    def score(self, batch: Sequence[Encoded], replica: int) -> list[Logits]:
        return [(0.0, 1.0)] * len(batch)


async def _nothing() -> None:
    pass


if __name__ == "__main__":
    engine = Engine(NullScorer(), batch_tokens=1024, max_queue_tokens=262_144).start()
    app = create_app(engine, default_label="POSITIVE")
    hooks = Hooks(ready=freeze, reload=_nothing, log=lambda event, **details: None)
    Server(app, 5.0, hooks).run(sockets=[socket.create_server(("127.0.0.1", int(sys.argv[1])))])
