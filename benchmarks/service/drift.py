"""How far the service's scores are from plain transformers in fp32, by number format, and what company changes.

    python -m benchmarks.service.drift

For two models, the embedded one and a random one of DistilBERT-base's size: every text's logits from
`AutoModelForSequenceClassification` in fp32, one text at a time without padding, and the same from the service's own
scorer, alone and in batches of up to 1024 tokens. Prints the largest and the mean absolute difference of the reward,
its rank correlation (Spearman), and the largest difference between a text alone and in company. A reward's spread over
the texts says what a difference means.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from harness.load.rewards import WORDS
from plaudit.reward_service.engine.batching import Encoded
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings

FORMATS = ("fp32", "bf16", "fp16", "int8")
BATCH_TOKENS = 1024
EMBEDDED = Path("models/imdb-distilbert-mini")
HEAD_SCALE = 25.0
"""A fresh head is drawn so small that its logits hardly differ; so much larger, they spread as a trained one's do."""


def random_base(directory: Path, tokenizer: Path) -> Path:
    """A random classifier of DistilBERT-base's size, with the tokenizer of another."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=30_522, id2label={0: "NEGATIVE", 1: "POSITIVE"}, pad_token_id=words.pad_token_id)
    )
    model.classifier.weight.data *= HEAD_SCALE
    model.save_pretrained(directory)
    words.model_max_length = 512
    words.save_pretrained(directory)
    return directory


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to some 300 words, most of them short."""
    draw = random.Random(seed)
    lengths = [min(300, max(1, round(draw.lognormvariate(3.6, 0.9)))) for _ in range(count)]
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]


@torch.inference_mode()
def by_transformers(model: Path, texts: Sequence[str]) -> np.ndarray:
    """The last label's logits in fp32, each text alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    length = classifier.config.max_position_embeddings
    inputs = (tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in texts)
    return np.array([classifier(**encoded).logits[0, -1].item() for encoded in inputs])


def by_service(scorer: TransformersScorer, texts: Sequence[str], *, alone: bool) -> np.ndarray:
    """The last label's logits from the service's scorer."""
    rows: list[float] = []
    batch: list[Encoded] = []
    encodings = scorer.encode([(text, None) for text in texts])
    for index, encoded in enumerate(encodings):
        batch.append(encoded)
        longer = sum(len(one.ids) for one in [*batch, *encodings[index + 1 : index + 2]])
        if alone or longer > BATCH_TOKENS or index + 1 == len(encodings):
            rows += [row[-1] for row in scorer.score(batch, 0)]
            batch = []
    return np.array(rows)


def rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.corrcoef(one.argsort().argsort(), other.argsort().argsort())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    texts = some_texts(arguments.texts)
    print("| model | format | largest | mean | rank correlation | alone against in company |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        models = {"embedded": EMBEDDED, "DistilBERT-base, random": random_base(Path(folder), EMBEDDED)}
        for name, model in models.items():
            wanted = by_transformers(model, texts)
            for dtype in arguments.formats:
                scorer = load_scorer(Settings(model=str(model), dtype=dtype))
                alone, together = (by_service(scorer, texts, alone=each) for each in (True, False))
                apart = np.abs(together - wanted)
                print(
                    f"| {name} | {dtype} | {apart.max():.1e} | {apart.mean():.1e} | "
                    f"{rank_correlation(together, wanted):.5f} | {np.abs(together - alone).max():.1e} |",
                    flush=True,
                )
            print(f"| {name} | spread of the reward (standard deviation) | {wanted.std():.2f} | | | |", flush=True)


if __name__ == "__main__":
    main()
