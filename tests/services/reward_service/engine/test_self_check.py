"""A service proves on its own model that a reward depends on the text alone, and batches as the model allows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertForSequenceClassification

from harness.tiny_judges import MAX_TOKENS, tiny_judge
from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine import packed, self_check
from plaudit.reward_service.engine.batching import Encoded, Logits
from plaudit.reward_service.engine.loading import Loaded
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings

TEXTS = ["good", "a longer text about a film that is good , and not bad", "", "the plot", "word " * 200]
BATCHING_MODES = {
    **dict.fromkeys(("distilbert", "roberta", "xlm-roberta", "bert"), "packed"),
    **dict.fromkeys(("mpnet", "longformer", "data2vec-text", "luke", "esm", "xlm-roberta-xl", "ibert"), "padded"),
    **dict.fromkeys(("roberta-prelayernorm", "xmod", "deberta-v2", "modernbert", "bart", "t5", "xlm"), "padded"),
    **dict.fromkeys(("gpt2", "llama", "gemma3_text", "opt", "jamba", "mpt", "zamba2"), "padded"),
    **dict.fromkeys(("xlnet", "convbert", "fnet"), "by length"),
}


def scorer_of(directory: Path, **settings: Any) -> TransformersScorer:
    return load_scorer(Settings(model=str(directory), **settings))


@pytest.mark.parametrize("family", BATCHING_MODES)
def test_scores_of_every_family_are_transformers_own_in_any_company_up_to_full_length(
    family: str, tmp_path: Path
) -> None:
    directory = tiny_judge(tmp_path, family)
    served = scorer_of(directory)
    assert served.batching == BATCHING_MODES[family]
    encodings = [encoded for encoded in served.encode([(text, None) for text in TEXTS]) if encoded.ids]
    assert max(len(encoded.ids) for encoded in encodings) >= MAX_TOKENS
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    takes_mask = family != "fnet"
    for encoded, row in zip(encodings, served.score(encodings, 0), strict=True):
        ids = torch.tensor([list(encoded.ids)])
        with torch.inference_mode():
            wanted = model(ids, **({"attention_mask": torch.ones_like(ids)} if takes_mask else {})).logits[0].tolist()
        assert row == pytest.approx(wanted, abs=1e-5, rel=1e-5)
        assert served.score([encoded], 0)[0] == pytest.approx(wanted, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_on_which_a_tokenizer_pads_changes_nothing(side: str, tmp_path: Path) -> None:
    directory = tiny_judge(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
    tokenizer.save_pretrained(directory)
    served = scorer_of(directory)
    encodings = served.encode([(text, None) for text in TEXTS if text])
    assert served.batching == "padded"
    for encoded, row in zip(encodings, served.score(encodings, 0), strict=True):
        assert served.score([encoded], 0)[0] == pytest.approx(row, abs=1e-5)


def test_what_was_found_is_told_in_figures(tmp_path: Path) -> None:
    found = scorer_of(tiny_judge(tmp_path, "xlnet"), max_tokens=40).checked
    json.dumps(found)
    assert (found["batches"], found["longest_tokens"], found["allowed"]) == ("by length", 40, 1e-5)
    assert str(found["not"]).startswith("padded: scores ")


def test_the_check_of_the_embedded_model_takes_less_than_a_second() -> None:
    assert float(str(scorer_of(Path("imdb-distilbert-mini")).checked["seconds"])) < 1


@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_other_number_formats_are_no_further_from_fp32_than_twice_transformers(
    family: str, dtype: str, tmp_path: Path
) -> None:
    found = scorer_of(tiny_judge(tmp_path, family), dtype=dtype).checked
    assert 1e-5 < float(str(found["apart"])) <= float(str(found["allowed"])) < 0.1


class Adapted(nn.Linear):
    """A layer with something beside its weights, as adapters have it."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) + 0.1


def test_a_module_of_an_unknown_type_is_called_and_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_classifier_dir(tmp_path)
    build = DistilBertForSequenceClassification.__init__

    def with_adapter(self: Any, config: Any) -> None:
        build(self, config)
        self.distilbert.transformer.layer[1].attention.v_lin.__class__ = Adapted

    plain = scorer_of(directory)
    monkeypatch.setattr(DistilBertForSequenceClassification, "__init__", with_adapter)
    adapted = scorer_of(directory)
    assert (plain.batching, adapted.batching) == ("packed", "padded")
    encodings = adapted.encode([(text, None) for text in TEXTS])
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for encoded, row in zip(encodings, adapted.score(encodings, 0), strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([list(encoded.ids)])).logits[0].tolist()
        assert row == pytest.approx(wanted, abs=1e-5)
        assert plain.score([encoded], 0)[0] != pytest.approx(wanted, abs=1e-3)


def test_packed_scores_that_are_not_the_models_own_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "gelu", torch.relu)
    monkeypatch.setattr(packed, "_is_gelu", lambda activation: True)
    monkeypatch.setattr(packed.PREPACKED_PRODUCT[torch.float32], "problem", "gone")
    found = scorer_of(tiny_classifier_dir(tmp_path)).checked
    assert found["batches"] == "padded"
    assert str(found["not"]).startswith("packed: scores ")


class Moody:
    """A scorer whose rows depend on the batch: `by` says in which batches they are off."""

    id = "moody"
    max_tokens = 16
    replicas = 1

    def __init__(self, by: dict[str, float]) -> None:
        self.batching: self_check.BatchingMode = "padded"
        self.modules = [self]
        self._by = by

    def to(self, device: torch.device) -> "Moody":
        return self

    def use(self, batching: self_check.BatchingMode) -> None:
        self.batching = batching

    def encode(self, texts: Any) -> list[Encoded]:
        return [Encoded([ord(letter) for letter in first][:16] or [1]) for first, _ in texts]

    def score(self, batch: Any, replica: int) -> list[Logits]:
        off = self._by.get(self.batching, 0.0) * (len(batch) > 1 or self.batching == "alone")
        return [(sum(encoded.ids) / 1000 + off,) for encoded in batch]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return type("Output", (), {"logits": input_ids.sum(1, keepdim=True) / 1000})


def found_by(subject: Moody) -> Any:
    tokenizer = type("Tokenizer", (), {"pad_token": None})()
    loaded = Loaded(subject, tokenizer, ("LABEL",), 16, 0, ("input_ids", "attention_mask"))
    return self_check.check_scores(subject, loaded, Settings(model="moody"), torch.device("cpu"))


def test_the_fastest_way_that_changes_no_score_is_taken() -> None:
    assert found_by(Moody({}))["batches"] == "padded"
    assert found_by(Moody({"padded": 0.1}))["batches"] == "by length"
    assert found_by(Moody({"padded": 0.1, "by length": 0.1}))["batches"] == "alone"


class Guessing(Moody):
    """Random in its last digits, as a model that hashes with random numbers."""

    def score(self, batch: Any, replica: int) -> list[Logits]:
        return [tuple(self(torch.tensor([list(encoded.ids)])).logits[0].tolist()) for encoded in batch]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return type("Output", (), {"logits": input_ids.sum(1, keepdim=True) / 1000 + 5e-4 * torch.rand(1)})


def test_a_model_that_is_random_in_its_last_digits_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="scores that do not depend on the text alone"):
        found_by(Guessing({}))


def test_a_model_that_changes_its_mind_is_refused() -> None:
    with pytest.raises(ModelError, match="scores that do not depend on the text alone"):
        found_by(Moody(dict.fromkeys(("padded", "by length", "alone"), 0.1)))


def test_a_family_that_attends_otherwise_after_a_short_text_is_refused_at_lengths_where_it_matters(
    tmp_path: Path,
) -> None:
    sparse = tiny_judge(tmp_path, "big_bird", max_position_embeddings=256, block_size=4, num_random_blocks=2)
    with pytest.raises(ModelError, match=r"change with earlier inputs.*try a smaller --max-tokens"):
        scorer_of(sparse)
    assert scorer_of(sparse, max_tokens=32).batching == "padded"


class Narrow(Moody):
    """Has positions for fewer tokens than it says."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        if input_ids.shape[1] > 8:
            raise IndexError("index out of range in self")
        return super().__call__(input_ids)


def test_a_model_that_does_not_run_at_its_full_length_says_so() -> None:
    with pytest.raises(ModelError, match=r"does not run on a text of 16 tokens.*IndexError: .*a smaller --max-tokens"):
        found_by(Narrow({}))


def zero_head(directory: Path, labels: slice) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        model.classifier.weight[labels] = 0
    model.save_pretrained(directory)
    return directory


def test_a_model_that_gives_all_words_one_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives different words the same score \(NEGATIVE, POSITIVE: "):
        scorer_of(zero_head(tiny_classifier_dir(tmp_path), slice(None)))


def test_one_dead_label_is_refused_only_where_it_is_the_reward(tmp_path: Path) -> None:
    directory = zero_head(tiny_classifier_dir(tmp_path), slice(1, 2))
    assert scorer_of(directory).batching == "packed"
    with pytest.raises(ModelError, match=r"gives different words the same score \(POSITIVE: "):
        scorer_of(directory, label="POSITIVE")


def test_a_score_that_leaves_the_number_format_is_refused(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        model.classifier.weight.mul_(50_000 / model.classifier.weight.abs().max())
    model.save_pretrained(directory)
    assert scorer_of(directory).batching == "packed"
    with pytest.raises(ModelError, match=r"as the logit of .* in fp16, which is no reward; try --dtype fp32"):
        scorer_of(directory, dtype="fp16")


def test_a_model_that_takes_a_frames_token_for_padding_is_refused(tmp_path: Path) -> None:
    directory = tiny_judge(tmp_path, "xlm", pad_token_id=0, pad_index=0)
    with pytest.raises(ModelError, match=r"takes '<s>' for padding \(pad_token_id 0 .*own padding token there \(1\)"):
        scorer_of(directory)


@pytest.mark.parametrize("family", ["distilbert", "bart", "gpt2"])
def test_pairs_are_part_of_the_check_where_texts_are_pairs(family: str, tmp_path: Path) -> None:
    assert scorer_of(tiny_judge(tmp_path, family), join="pair").checked["longest_tokens"] == MAX_TOKENS
