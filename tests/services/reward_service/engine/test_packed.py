"""Encoders without padding: a text's score doesn't know its company, in whatever order and number format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine import packed
from plaudit.reward_service.engine.packed import ROWS_AT_ONCE, PackedEncoder, can_pack

SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
IDS = [[2, 9, 3], [2, 7, 8, 9, 3], [2, 9, 3], [2, 3], [2, *range(5, 55), 3], [2, 9, 11, 3]] * 12
"""Several texts of one length, some of them apart; together more rows than go through a feed-forward at once."""


@pytest.fixture(params=["distilbert", "bert", "roberta"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_classifier_dir(tmp_path, family=request.param)


def test_a_batch_of_many_lengths_gives_what_transformers_gives_for_each_alone(directory: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    exact = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()
    types = [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in IDS]
    takes_types = hasattr(model.base_model.embeddings, "token_type_embeddings")
    with torch.inference_mode():
        wanted = [
            exact(torch.tensor([ids]), **({"token_type_ids": torch.tensor([kinds])} if takes_types else {})).logits[0]
            for ids, kinds in zip(IDS, types, strict=True)
        ]
    assert sum(map(len, IDS)) > ROWS_AT_ONCE
    got = PackedEncoder(model)(IDS, types if takes_types else None)
    torch.testing.assert_close(got, torch.stack(wanted).float(), atol=1e-5, rtol=2e-6)


def test_in_int8_a_text_scores_the_same_in_any_company(directory: Path) -> None:
    encoder = PackedEncoder(AutoModelForSequenceClassification.from_pretrained(directory).eval(), int8=True)
    together = encoder(IDS, None)
    for ids, row in zip(IDS, together, strict=True):
        torch.testing.assert_close(encoder([ids], None)[0], row, atol=1e-5, rtol=0)


def test_int8_is_the_same_on_a_processor_without_exact_integers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    here = PackedEncoder(model, int8=True)(IDS, None)
    monkeypatch.setattr(packed.INT8_PRODUCT, "problem", "no VNNI")
    there = PackedEncoder(model, int8=True)(IDS, None)
    torch.testing.assert_close(there, here, atol=1e-5, rtol=2e-6)


def test_only_encoders_that_read_the_first_token_are_packed() -> None:
    assert can_pack(BertForSequenceClassification(BertConfig(**SMALL)))
    assert not can_pack(BertForSequenceClassification(BertConfig(**SMALL, is_decoder=True)))
    assert not can_pack(GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=10)))
