"""The usual first reward server: an async handler that runs the model on the event loop.

PORT, and the model in REWARD_MODEL; where it runs in REWARD_DEVICE, its number format in REWARD_DTYPE.
"""

import os
import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(os.environ["REWARD_MODEL"])
device, dtype = os.environ.get("REWARD_DEVICE", "cpu"), os.environ.get("REWARD_DTYPE", "float32")
model = AutoModelForSequenceClassification.from_pretrained(os.environ["REWARD_MODEL"], dtype=dtype).to(device).eval()
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> dict[str, float]:
    text = (await request.json())["text"]
    with torch.inference_mode():
        inputs = tokenizer([text], truncation=True, max_length=512, return_tensors="pt").to(device)
        return {"reward": model(**inputs).logits[0, 1].item()}


uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
