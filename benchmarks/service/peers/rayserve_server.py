"""Ray Serve with @serve.batch, one replica. PORT, and the model in REWARD_MODEL"""

import os
import signal
import sys

import ray
from batched import MAX_BATCH, MAX_WAIT_S, Judge
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1})
class Rewards:
    def __init__(self, model: str) -> None:
        self._judge = Judge(model)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_WAIT_S)
    async def score(self, texts: list[str]) -> list[float]:
        return self._judge(texts)

    async def __call__(self, request: Request) -> dict[str, float]:
        return {"reward": await self.score((await request.json())["text"])}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Rewards.bind(os.environ["REWARD_MODEL"]), route_prefix="/predict")
    # The driver's end would otherwise leave replica and proxy behind.
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
