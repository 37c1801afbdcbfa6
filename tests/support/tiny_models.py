"""Models of a few thousand random parameters, made on the spot. The same seed makes the same bytes."""

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = (
    *string.ascii_lowercase,
    *(f"##{letter}" for letter in string.ascii_lowercase),
    *string.digits,
    *".,!?'-",
    *("the", "this", "movie", "film", "was", "is", "not", "and", "but", "good", "bad", "great", "terrible"),
    *(
        "wonderful",
        "awful",
        "boring",
        "best",
        "worst",
        "plot",
        "acting",
        "it",
        "of",
        "to",
        "in",
        "story",
        "love",
        "hate",
    ),
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_wordpiece_tokenizer(max_length: int = 64) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer that spells any lower-case English word."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_classifier_dir(
    path: Path, labels: Sequence[str] = ("NEGATIVE", "POSITIVE"), seed: int = 0, family: str = "distilbert"
) -> Path:
    """A random classifier with its tokenizer, saved as a plain Hugging Face directory."""
    torch.manual_seed(seed)
    _classifier(family, labels).save_pretrained(path)
    tiny_wordpiece_tokenizer().save_pretrained(path)
    return path


def _classifier(family: str, labels: Sequence[str]) -> PreTrainedModel:
    common = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "pad_token_id": 0,
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    if family == "distilbert":
        return DistilBertForSequenceClassification(
            DistilBertConfig(**common, dim=32, hidden_dim=64, n_heads=2, n_layers=2, max_position_embeddings=64)
        )
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**common, **encoder, max_position_embeddings=64))
    if family == "roberta":
        return RobertaForSequenceClassification(
            RobertaConfig(**common, **encoder, max_position_embeddings=65, type_vocab_size=2)
        )
    assert family == "gpt2"
    return GPT2ForSequenceClassification(
        GPT2Config(**common | {"pad_token_id": None}, n_embd=32, n_head=2, n_layer=2, n_positions=64)
    )
