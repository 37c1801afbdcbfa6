"""Stage 1: rows as they should be, a loss that is transformers' own, a directory that plain transformers loads."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from harness.tiny_models import tiny_gpt2, tiny_tokenizer
from plaudit.policy.from_scratch import train_tokenizer
from plaudit.policy.model import add_lora
from plaudit.settings.data import DataSettings
from plaudit.settings.policy import LoraSettings
from plaudit.settings.sft import SFTConfig
from plaudit.settings.supervised import ModelSizes, OptimizerSettings
from plaudit.stages import sft

SIZES = ModelSizes("gpt2", vocab_size=300, hidden_size=16, layers=1, heads=2, max_positions=32)
OPTIMIZER = OptimizerSettings(learning_rate=5e-3, batch_size=8, max_steps=60, warmup_fraction=0.0)


def test_rows_start_where_texts_start_and_no_token_is_lost() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["This movie was wonderful. " * 5, "Bad."]
    rows = sft.token_rows(tokenizer, texts, 16)
    assert all(2 <= len(row) <= 16 for row in rows)
    assert tokenizer.decode([token for row in rows for token in row]) == "".join(
        f"{text}{tokenizer.eos_token}" for text in texts
    )
    assert tokenizer.decode(rows[0]).startswith("This movie")


def test_the_held_out_loss_is_that_of_the_model_row_by_row() -> None:
    model, rows = tiny_gpt2(), [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    losses = []
    for row in rows:
        ids = torch.tensor([row])
        losses.append(model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1))
    assert sft.held_out_loss(model, rows, batch_size=2) == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_from_scratch_it_learns_and_saves_what_transformers_loads(reviews: Path, tmp_path: Path) -> None:
    result = sft.run(
        SFTConfig(
            from_scratch=True,
            sizes=SIZES,
            output_dir=tmp_path / "sft",
            dataset=DataSettings(str(reviews)),
            optimizer=OPTIMIZER,
            max_length=32,
            half_precision=True,
        )
    )
    assert result.perplexity < 30  # uniform guessing over the vocabulary would be 300
    assert result.perplexity == pytest.approx(math.exp(result.held_out_loss))
    assert json.loads((tmp_path / "sft" / "sft.json").read_text())["perplexity"] == result.perplexity
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "sft" / "model.safetensors").stat().st_size < 50_000


def test_fine_tuning_starts_from_the_model_it_is_given(policy_dir: Path, reviews: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    held_out = sft.token_rows(tokenizer, ["Film 7 is great. The acting is moving."], 32)
    before = sft.held_out_loss(tiny_gpt2(), held_out)
    sft.run(
        SFTConfig(
            model=str(policy_dir),
            output_dir=tmp_path / "sft",
            dataset=DataSettings(str(reviews)),
            optimizer=OPTIMIZER,
            max_length=32,
        )
    )
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert sft.held_out_loss(after, held_out) < before - 1


def test_fine_tuning_may_start_from_adapters_and_gives_a_whole_model(
    policy_dir: Path, reviews: Path, tmp_path: Path
) -> None:
    adapters = add_lora(transformers.AutoModelForCausalLM.from_pretrained(policy_dir), LoraSettings(r=2))
    adapters.save_pretrained(tmp_path / "adapters")
    sft.run(
        SFTConfig(
            model=str(tmp_path / "adapters"),
            output_dir=tmp_path / "sft",
            dataset=DataSettings(str(reviews)),
            optimizer=OptimizerSettings(batch_size=8, max_steps=2),
            max_length=32,
        )
    )
    assert not list((tmp_path / "sft").glob("adapter*"))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert {name.partition(".lora")[0] for name in saved.state_dict()} == set(tiny_gpt2().state_dict())


def test_a_trained_tokenizer_gives_any_text_back() -> None:
    tokenizer = train_tokenizer(["a small text about films"], vocab_size=300, max_length=32)
    text = " Tabs\t, ümlauts, 映画 and \U0001f3ac\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
