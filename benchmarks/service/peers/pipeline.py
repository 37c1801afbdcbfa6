"""transformers' pipeline behind FastAPI's thread pool.

PORT, and the model in REWARD_MODEL; where it runs in REWARD_DEVICE, its number format in REWARD_DTYPE.
"""

import os
import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

torch.set_num_threads(1)
classify = pipeline(
    "text-classification",
    model=os.environ["REWARD_MODEL"],
    device=os.environ.get("REWARD_DEVICE", "cpu"),
    dtype=os.environ.get("REWARD_DTYPE", "float32"),
    top_k=None,
    function_to_apply="none",
)
app = FastAPI()


class Body(BaseModel):
    text: str


@app.post("/predict")
def predict(body: Body) -> dict[str, float]:
    scores = classify([body.text], truncation=True, max_length=512)[0]
    return {"reward": next(score["score"] for score in scores if score["label"] == "POSITIVE")}


uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
