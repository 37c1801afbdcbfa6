"""LitServe with its batching. PORT, and the model in REWARD_MODEL"""

import os
import sys
from typing import Any

import litserve
from batched import MAX_BATCH, MAX_WAIT_S, Judge


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._judge = Judge(os.environ["REWARD_MODEL"])

    def decode_request(self, request: dict[str, Any]) -> str:
        return request["text"]

    def predict(self, texts: list[str]) -> list[float]:
        return self._judge(texts)

    def encode_response(self, reward: float) -> dict[str, float]:
        return {"reward": reward}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(port=int(sys.argv[1]), host="127.0.0.1", log_level="warning", generate_client_file=False)
