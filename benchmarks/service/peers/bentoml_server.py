"""BentoML with its adaptive batching; `bentoml serve bentoml_server:Rewards`, the model in REWARD_MODEL."""

import os

import bentoml
from batched import MAX_BATCH, Judge


@bentoml.service(traffic={"timeout": 600}, workers=1)
class Rewards:
    def __init__(self) -> None:
        self._judge = Judge(os.environ["REWARD_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=600_000)
    def predict(self, text: list[str]) -> list[float]:
        return self._judge(text)
