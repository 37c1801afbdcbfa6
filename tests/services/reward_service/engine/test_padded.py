"""Batches with padding: one piece of memory that is used again and leaves nothing behind, also widened as for a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine.batching import Encoded
from plaudit.reward_service.engine.padded import PaddedModel


class Recorded:
    """A model that keeps what it is given; its logits are row sums."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.held: list[torch.Tensor] = []
        """The very tensors, so that their memory can't be given to others."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and width of each batch."""
        return [(len(given["input_ids"]), len(given["input_ids"][0])) for given in self.inputs]

    def __call__(self, **inputs: torch.Tensor) -> Any:
        self.inputs.append({name: tensor.tolist() for name, tensor in inputs.items()})
        self.held.append(inputs["input_ids"])
        return SimpleNamespace(logits=inputs["input_ids"].sum(1, keepdim=True).half())


def padded(model: Any, *, takes_type_ids: bool = True) -> PaddedModel:
    return PaddedModel(model, torch.device("cpu"), pad_id=9, max_tokens=64, takes_type_ids=takes_type_ids)


def test_a_smaller_batch_after_a_larger_one_holds_nothing_of_it() -> None:
    model = Recorded()
    run = padded(model)
    run([Encoded([5, 5, 5], [1, 1, 1]), Encoded([5, 5], [1, 1])])
    logits = run([Encoded([1, 2], [0, 1]), Encoded([3])])
    assert model.inputs[1] == {
        "input_ids": [[1, 2], [3, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[0, 1], [0, 0]],
    }
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[3.0], [12.0]]


def test_a_model_without_type_ids_is_given_none() -> None:
    model = Recorded()
    padded(model, takes_type_ids=False)([Encoded([1])])
    assert model.inputs[0].keys() == {"input_ids", "attention_mask"}


def test_memory_is_taken_anew_only_for_a_larger_batch() -> None:
    model = Recorded()
    run = padded(model)
    for length, rows in ((8, 4), (4, 2), (8, 4), (8, 5)):
        run([Encoded([1] * length)] * rows)
    first, smaller, equal, larger = (tensor.data_ptr() for tensor in model.held)
    assert first == smaller == equal
    assert larger != first


def test_widened_rows_and_the_warm_up_change_no_logit(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier_dir(tmp_path)).eval()
    run = PaddedModel(model, torch.device("cpu"), pad_id=0, max_tokens=60, takes_type_ids=False, width_step=8)
    run.warm_up(batch_tokens=256)
    texts = [[2, 7, 3], [2, *range(5, 20), 3]]
    with torch.inference_mode():
        wanted = torch.cat([model(torch.tensor([ids])).logits for ids in texts])
    torch.testing.assert_close(run([Encoded(ids) for ids in texts]), wanted, atol=1e-5, rtol=2e-6)


def test_the_warm_up_meets_every_order_of_width_in_batches_of_the_usual_size() -> None:
    model = Recorded()
    PaddedModel(model, torch.device("cpu"), pad_id=0, max_tokens=60, takes_type_ids=False, width_step=8).warm_up(
        batch_tokens=256
    )
    assert model.shapes == [(32, 8), (16, 16), (8, 32), (4, 60)]


@pytest.mark.parametrize(
    ("pad_id", "max_tokens", "length", "width"), [(0, 64, 5, 8), (0, 60, 58, 60), (0, 60, 60, 60), (-1, 64, 5, 5)]
)
def test_rows_are_widened_neither_past_the_positions_nor_without_a_padding_token(
    pad_id: int, max_tokens: int, length: int, width: int
) -> None:
    model = Recorded()
    run = PaddedModel(
        model, torch.device("cpu"), pad_id=pad_id, max_tokens=max_tokens, takes_type_ids=False, width_step=8
    )
    run([Encoded([1] * length)])
    assert model.shapes == [(1, width)]
