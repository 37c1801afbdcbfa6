"""A plain FastAPI server over an engine of `engines.py`: PORT ENGINE FORMAT alone|batched; the model in REWARD_MODEL.

`alone` runs each text on the event loop, as `naive.py` does. `batched` collects up to 32 texts, waits at most 5 ms for
them, and runs a batch in a thread while the next one is collected.
"""

import asyncio
import os
import sys
from contextlib import asynccontextmanager

import uvicorn
from engines import load
from fastapi import FastAPI, Request

# The same as in batched.py, which needs torch.
MAX_BATCH = 32
MAX_WAIT_S = 0.005

port, engine, number_format, how = sys.argv[1:]
judge = load(engine, number_format, os.environ["REWARD_MODEL"])
waiting: asyncio.Queue = asyncio.Queue()


async def run_batches() -> None:
    while True:
        batch = [await waiting.get()]
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                while len(batch) < MAX_BATCH:
                    batch.append(await waiting.get())
        except TimeoutError:
            pass
        try:
            rewards = await asyncio.to_thread(judge, [text for text, _ in batch])
        except Exception as error:
            for _, answer in batch:
                answer.set_exception(error)
        else:
            for (_, answer), reward in zip(batch, rewards, strict=True):
                answer.set_result(reward)


@asynccontextmanager
async def lifespan(_: FastAPI):
    runner = asyncio.create_task(run_batches())
    yield
    runner.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(request: Request) -> dict[str, float]:
    text = (await request.json())["text"]
    if how == "alone":
        return {"reward": judge([text])[0]}
    answer = asyncio.get_running_loop().create_future()
    waiting.put_nowait((text, answer))
    return {"reward": await answer}


uvicorn.run(app, port=int(port), log_level="warning", access_log=False)
