"""KServe's model server, the model in an async `predict` as in its own encoders. PORT, the model in REWARD_MODEL."""

import os
import sys
from typing import Any

import kserve
from batched import Judge


class Rewards(kserve.Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._judge = Judge(os.environ["REWARD_MODEL"])
        self.ready = True

    async def predict(self, payload: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return {"predictions": self._judge(payload["instances"])}


if __name__ == "__main__":
    kserve.ModelServer(http_port=int(sys.argv[1]), workers=1, enable_grpc=False).start([Rewards("judge")])
