"""The models of a size, with which all contestants of `benchmarks.ppo.step` work."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

SMALL_POLICY, SMALL_JUDGE = Path("models/imdb-gpt2-mini"), Path("models/imdb-distilbert-mini")
SIZES = {"124m": GPT2Config(), "1b": GPT2Config(n_embd=1536, n_layer=32, n_head=16)}


@dataclass(frozen=True)
class Models:
    """Directories of transformers."""

    policy: Path
    judge: Path


def models_of(size: str, directory: Path) -> Models:
    """The models of a size; those with random weights are written to `directory`, with the embedded tokenizers."""
    if size == "demo":
        return Models(SMALL_POLICY, SMALL_JUDGE)
    torch.manual_seed(0)
    models = Models(directory / "policy", directory / "judge")
    GPT2LMHeadModel(SIZES[size]).save_pretrained(models.policy)
    DistilBertForSequenceClassification(
        DistilBertConfig(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    ).save_pretrained(models.judge)
    AutoTokenizer.from_pretrained(SMALL_POLICY).save_pretrained(models.policy)
    AutoTokenizer.from_pretrained(SMALL_JUDGE).save_pretrained(models.judge)
    return models


def judge_of_tokens(models: Models, path: Path) -> Path:
    """A judge that reads the policy's tokens: a GPT-2 with a score head and random weights, saved under `path`.

    Its blocks are as many, as wide and as many-headed as those of the DistilBERT in `models`, so it costs the same.
    """
    policy, judge = AutoConfig.from_pretrained(models.policy), AutoConfig.from_pretrained(models.judge)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=policy.vocab_size,
        n_positions=policy.n_positions,
        n_layer=judge.n_layers,
        n_embd=judge.dim,
        n_head=judge.n_heads,
        n_inner=judge.hidden_dim,
        num_labels=1,
        bos_token_id=policy.bos_token_id,
        eos_token_id=policy.eos_token_id,
        pad_token_id=policy.eos_token_id,
    )
    GPT2ForSequenceClassification(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(models.policy).save_pretrained(path)
    return path
