"""A real (tiny) model behind the scorer: its scores are the model's own, whatever the company and the length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine import scorer as scorer_module
from plaudit.reward_service.engine.loading import read_model
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings
from plaudit.wire.revisions import content_revision

TEXTS = [
    "this movie was great",
    "bad",
    "",
    "the worst plot i hate it . " * 4,
    "a wonderful story !",
    "\0",
    "a good [PAD] movie",
    "movie " * 500,
]


def scorer_of(directory: Path, **settings: Any) -> TransformersScorer:
    return load_scorer(Settings(model=str(directory), **settings))


def transformers_logits(directory: Path, *text: str) -> list[float]:
    """In double precision: in single, transformers' own rounding is as large as ours."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits: list[float] = model(**tokenizer(*text, truncation=True, return_tensors="pt")).logits[0].tolist()
    return logits


@pytest.fixture(scope="module", params=["distilbert", "bert", "roberta", "gpt2"])
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier_dir(tmp_path_factory.mktemp(request.param), family=request.param)


def test_scores_are_those_of_transformers_alone_or_in_company(family_dir: Path) -> None:
    scorer = scorer_of(family_dir)
    encodings = scorer.encode([(text, None) for text in TEXTS])
    together = scorer.score(encodings, 0)
    for text, encoded, row in zip(TEXTS, encodings, together, strict=True):
        expected = transformers_logits(family_dir, text)
        assert row == pytest.approx(expected, abs=1e-5)
        assert scorer.score([encoded], 0)[0] == pytest.approx(expected, abs=1e-5)


def test_encoders_run_without_padding_and_decoders_with_it(family_dir: Path) -> None:
    assert scorer_of(family_dir).packed == ("gpt2" not in family_dir.name)


def test_deterministic_scores_are_bit_equal_in_any_company(family_dir: Path) -> None:
    scorer = scorer_of(family_dir, deterministic=True)
    encodings = scorer.encode([(text, None) for text in TEXTS])
    alone = [scorer.score([encoded], 0)[0] for encoded in encodings]
    assert scorer.score(encodings, 0) == alone
    assert scorer.score(encodings[::-1], 0) == alone[::-1]


@pytest.mark.parametrize(("dtype", "drift"), [("int8", 0.35), ("bf16", 0.1), ("fp16", 0.02)])
def test_other_number_formats_stay_near_fp32(classifier_dir: Path, dtype: str, drift: float) -> None:
    exact, near = scorer_of(classifier_dir), scorer_of(classifier_dir, dtype=dtype)
    encodings = exact.encode([(text, None) for text in TEXTS])
    wanted, got = (torch.tensor(scorer.score(encodings, 0)) for scorer in (exact, near))
    assert not torch.equal(got, wanted)
    assert (got - wanted).square().mean().sqrt() < drift * wanted.std()


def test_two_replicas_on_the_cpu_give_the_same_scores(classifier_dir: Path) -> None:
    scorer = scorer_of(classifier_dir, devices="cpu,cpu")
    encodings = scorer.encode([(text, None) for text in TEXTS])
    assert scorer.replicas == 2
    assert scorer.score(encodings, 0) == scorer.score(encodings, 1)


def test_a_pair_is_joined_by_the_tokenizer(classifier_dir: Path) -> None:
    scorer = scorer_of(classifier_dir)
    [row] = scorer.score(scorer.encode([("this movie", "was great")]), 0)
    assert row == pytest.approx(transformers_logits(classifier_dir, "this movie", "was great"), abs=1e-5)


def test_a_cut_text_is_marked_and_keeps_the_end_that_was_asked_for(classifier_dir: Path) -> None:
    text = "good " * 100 + "bad " * 100
    right, left = scorer_of(classifier_dir), scorer_of(classifier_dir, truncation_side="left")
    [first], [last] = right.encode([(text, None)]), left.encode([(text, None)])
    assert first.truncated
    assert last.truncated
    [good], [bad] = right.encode([("good " * 62, None)]), right.encode([("bad " * 62, None)])
    assert list(first.ids) == list(good.ids)
    assert list(last.ids) == list(bad.ids)
    assert not good.truncated
    assert len(first.ids) == right.max_tokens == 64


def test_a_megabyte_of_one_letter_is_cut_before_it_is_tokenised(classifier_dir: Path) -> None:
    scorer = scorer_of(classifier_dir)
    [encoded] = scorer.encode([("a" * 1_000_000, None)])
    assert encoded.truncated
    assert len(scorer.score([encoded], 0)) == 1


def test_the_revision_follows_the_content_and_not_the_place(classifier_dir: Path, tmp_path: Path) -> None:
    same = tiny_classifier_dir(tmp_path / "same")
    other = tiny_classifier_dir(tmp_path / "other", seed=1)
    assert content_revision(same) == content_revision(classifier_dir)
    assert content_revision(other) != content_revision(classifier_dir)
    assert content_revision(same).startswith("sha256:")


def test_what_is_no_classifier_is_refused_in_one_line(classifier_dir: Path, tmp_path: Path) -> None:
    language_model = tmp_path / "language-model"
    DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=50, dim=16, hidden_dim=16, n_heads=2, n_layers=1)
    ).save_pretrained(language_model)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tiny_classifier_dir(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a tensor")
    for directory, said in [
        (language_model, "lack"),
        (empty, "holds no config.json"),
        (broken, "can be loaded"),
        (tmp_path / "nowhere", "there is no directory"),
        (classifier_dir / "config.json", "is a file"),
    ]:
        with pytest.raises(ModelError, match=said) as caught:
            scorer_of(directory)
        assert "\n" not in str(caught.value)


def test_a_label_that_the_model_lacks_is_refused_at_start(classifier_dir: Path) -> None:
    with pytest.raises(ModelError, match="no label 'HAPPY'; its labels are NEGATIVE, POSITIVE"):
        scorer_of(classifier_dir, label="HAPPY")


def test_another_model_written_over_its_files_does_not_touch_the_one_that_serves(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path / "model")
    scorer = scorer_of(directory)
    encodings = scorer.encode([(text, None) for text in TEXTS])
    before = scorer.score(encodings, 0)
    weights = directory / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert scorer.score(encodings, 0) == before


def test_files_that_change_while_they_are_read_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_classifier_dir(tmp_path / "model")
    load = read_model

    def load_and_write(*arguments: Any) -> Any:
        loaded = load(*arguments)
        tiny_classifier_dir(directory, seed=1)
        return loaded

    monkeypatch.setattr(scorer_module, "read_model", load_and_write)
    with pytest.raises(ModelError, match="changed while it was being read"):
        scorer_of(directory)


def test_files_that_cannot_be_read_are_told_in_a_line(family_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path / "model.safetensors"))

    monkeypatch.setattr(scorer_module, "content_revision", unreadable)
    with pytest.raises(ModelError, match=r"can't be read: PermissionError: .*Permission denied.*model\.safetensors"):
        scorer_of(family_dir)
