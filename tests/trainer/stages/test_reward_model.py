"""Stage 2: judgements by hand, and both kinds of reward model from nothing on reviews that are easy to judge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness.tiny_models import tiny_classifier_dir
from plaudit.errors import ConfigError, NotFinite
from plaudit.settings.data import DataSettings
from plaudit.settings.policy import LoraSettings
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.supervised import ModelSizes, OptimizerSettings
from plaudit.stages import judge_model, reward_model

SIZES = ModelSizes("distilbert", vocab_size=300, hidden_size=32, layers=1, heads=2, max_positions=64)


def config(tmp_path: Path, reviews: Path, **settings: object) -> RewardModelConfig:
    return RewardModelConfig(
        from_scratch=True,
        sizes=SIZES,
        output_dir=tmp_path / "judge",
        dataset=DataSettings(str(reviews)),
        optimizer=OptimizerSettings(learning_rate=3e-3, batch_size=16, max_steps=60),
        max_length=64,
        **settings,  # type: ignore[arg-type]
    )


def test_accuracy_and_calibration_error_of_four_judgements_by_hand() -> None:
    probabilities = torch.tensor([[0.05, 0.95], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    judged = reward_model.judge(probabilities, torch.tensor([1, 0, 1, 0]))
    assert judged.accuracy == 0.75
    # Bin 0.9: two right at 0.95, off by 0.05. Bin 0.6: one of two right at 0.65, off by 0.15. Half of the samples each.
    assert judged.calibration_error == pytest.approx(0.10)


def test_a_classifier_learns_names_its_labels_and_says_how_good_it_is(reviews: Path, tmp_path: Path) -> None:
    judged = reward_model.run(config(tmp_path, reviews))
    assert set(judged) == {"whole texts", "first 20 words"}
    assert judged["whole texts"].accuracy > 0.9
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert json.loads((tmp_path / "judge" / "reward_model.json").read_text())["held_out"]["whole texts"]["n"] > 10


@pytest.mark.parametrize("family", ["distilbert", "bert", "roberta", "gpt2"])
def test_a_classifier_learns_by_adapters_that_are_folded_into_it(family: str, reviews: Path, tmp_path: Path) -> None:
    start = tiny_classifier_dir(tmp_path / "start", family=family)
    before = load_file(start / "model.safetensors")
    settings = RewardModelConfig(
        model=str(start),
        output_dir=tmp_path / "judge",
        dataset=DataSettings(str(reviews), max_texts=64),
        optimizer=OptimizerSettings(learning_rate=1e-2, batch_size=16, max_steps=4),
        lora=LoraSettings(r=4),
        max_length=48,
        eval_examples=7,
    )
    judged = reward_model.run(settings)
    assert {found.n for found in judged.values() if isinstance(found, reward_model.Judgement)} == {7}
    assert not list(settings.output_dir.glob("adapter*"))
    after = load_file(settings.output_dir / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    head = {name for name in after if not name.startswith((f"{family}.", "transformer."))}
    assert head <= changed
    assert changed - head  # where the adapters are
    assert not any("embed" in name or "wte" in name for name in changed)


def test_ranked_answers_train_a_model_of_one_score_that_ranks_them(reviews: Path, tmp_path: Path) -> None:
    ranked = tmp_path / "ranked.jsonl"
    answers = [" is wonderful and great.", " is a film.", " is terrible and awful."]
    ranked.write_text("".join(json.dumps({"prompt": f"Film number {i}", "answers": answers}) + "\n" for i in range(80)))
    judged = reward_model.run(config(tmp_path, reviews, kind="pairwise", ranked=str(ranked)))
    assert judged["pairs"].accuracy == 1.0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "judge")
    scores = judge_model.logits(model, tokenizer, [f"A new film{answer}" for answer in answers], 64)
    assert scores.shape == (3, 1)
    assert scores[0] > scores[1] > scores[2]


def test_half_of_the_short_passages_keep_their_opening(reviews: Path, tmp_path: Path, tokenizer: Any) -> None:
    settings = config(tmp_path, reviews, crop_fraction=1.0, crop_min_tokens=8, crop_max_tokens=8)
    collate = reward_model.CroppingCollator(tokenizer, settings)
    text = " ".join(f"w{i}" for i in range(200))
    ids = collate([{"text": text, "label": 1}] * 400)["input_ids"]
    assert ids.shape == (400, 8)
    opening = judge_model.encode(tokenizer, [text], 8)["input_ids"][0]
    kept = (ids == opening).all(1).float().mean().item()
    assert 0.4 < kept < 0.6


def test_logits_come_back_in_the_order_of_the_texts(reviews: Path, tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path / "tiny")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["a much longer text about a film", "short", "one of middle length"]
    together = judge_model.logits(model, tokenizer, texts, 32, batch_size=2)
    alone = torch.cat([judge_model.logits(model, tokenizer, [text], 32) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_logits_that_are_not_finite_are_no_judgement(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path / "tiny")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with pytest.raises(NotFinite, match="neither judged nor saved"):
        judge_model.logits(model, tokenizer, ["a film"], 32)


def test_a_pairwise_model_needs_ranked_answers() -> None:
    with pytest.raises(ConfigError, match="ranked=FILE"):
        RewardModelConfig(kind="pairwise")


@pytest.mark.parametrize(("quantization", "family"), [("8bit", "distilbert"), ("4bit", "gpt2")])
def test_a_quantised_body_is_trained_and_the_result_is_in_full_precision(
    quantization: Any, family: str, reviews: Path, tmp_path: Path
) -> None:
    start = tiny_classifier_dir(tmp_path / "start", family=family)
    before = load_file(start / "model.safetensors")

    def trained(quantization: Any) -> dict[str, torch.Tensor]:
        settings = RewardModelConfig(
            model=str(start),
            output_dir=tmp_path / f"judge-{quantization}",
            dataset=DataSettings(str(reviews), max_texts=64),
            optimizer=OptimizerSettings(learning_rate=1e-2, batch_size=16, max_steps=4),
            lora=LoraSettings(r=4, dropout=0.0),
            quantization=quantization,
            max_length=48,
        )
        reward_model.run(settings)
        return load_file(settings.output_dir / "model.safetensors")

    plain, after = trained(None), trained(quantization)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in before.items()
    }

    def changed(weights: dict[str, torch.Tensor]) -> set[str]:
        return {name for name in weights if not torch.equal(weights[name], before[name])}

    assert changed(after) == changed(plain)  # head and layers with adapters; the others are the base's own
