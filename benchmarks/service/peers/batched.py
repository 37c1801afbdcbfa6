"""What the batching peers run on a batch: tokenise with padding, one forward pass."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MAX_BATCH = 32
MAX_WAIT_S = 0.005


class Judge:
    """The model, and its rewards for a list of texts."""

    def __init__(self, directory: str) -> None:
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForSequenceClassification.from_pretrained(directory).eval()

    def __call__(self, texts: list[str]) -> list[float]:
        with torch.inference_mode():
            inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
            rewards: list[float] = self._model(**inputs).logits[:, 1].tolist()
            return rewards
