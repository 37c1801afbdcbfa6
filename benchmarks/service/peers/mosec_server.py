"""mosec with its batching; `mosec_server.py --port PORT`, and the model in REWARD_MODEL."""

import os
from typing import Any

from batched import MAX_BATCH, MAX_WAIT_S, Judge
from mosec import Server, Worker


class Rewards(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._judge = Judge(os.environ["REWARD_MODEL"])

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [{"reward": reward} for reward in self._judge([each["text"] for each in data])]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Rewards, num=1, max_batch_size=MAX_BATCH, max_wait_time=round(MAX_WAIT_S * 1000), timeout=600)
    server.run()
