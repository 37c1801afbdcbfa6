"""The compiled model of padded batches: the same scores, and nothing left to compile once it serves."""

import shutil
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError
from torch._dynamo.utils import counters

from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine.batching import Encoded, Logits
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings

SHAPES = [[1], [64], [30, 2], [1, 1, 1], [9] * 17, [64, 1, 33], [2], [63, 64]]
"""Lengths of the texts of a batch."""


def scores_of(scorer: TransformersScorer) -> list[list[Logits]]:
    """In a thread that didn't compile anything, as in the service."""
    rows: list[list[Logits]] = []
    batches = [[Encoded([5 + place % 20 for place in range(length)]) for length in lengths] for lengths in SHAPES]
    thread = threading.Thread(target=lambda: rows.extend(scorer.score(batch, 0) for batch in batches))
    thread.start()
    thread.join()
    return rows


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++ here")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler loads what torch deprecates
def test_scores_are_the_same_and_nothing_is_compiled_once_it_serves(tmp_path: Path) -> None:
    directory = str(tiny_classifier_dir(tmp_path, family="gpt2"))
    plain = scores_of(load_scorer(Settings(model=directory)))
    before = counters["stats"]["unique_graphs"]
    scorer = load_scorer(Settings(model=directory, compile=True))
    ready = counters["stats"]["unique_graphs"]
    assert ready > before
    compiled = scores_of(scorer)
    reloaded = scores_of(load_scorer(Settings(model=directory, compile=True)))
    assert counters["stats"]["unique_graphs"] == ready
    for one, other, third in zip(plain, compiled, reloaded, strict=True):
        for row, same, again in zip(one, other, third, strict=True):
            assert same == pytest.approx(row, abs=1e-5)
            assert again == same


def test_what_is_not_compiled_is_refused(classifier_dir: Path) -> None:
    with pytest.raises(ModelError, match="runs without padding on a CPU"):
        load_scorer(Settings(model=str(classifier_dir), compile=True))
    with pytest.raises(ValidationError, match="--compile needs a floating-point --dtype, and it is int8"):
        Settings(model=str(classifier_dir), compile=True, dtype="int8")
