"""Models of a few thousand random parameters, made on the spot. The same seed makes the same bytes."""

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

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


def tiny_classifier_dir(path: Path, labels: Sequence[str] = ("NEGATIVE", "POSITIVE"), seed: int = 0) -> Path:
    """A random DistilBERT classifier with its tokenizer, saved as a plain Hugging Face directory."""
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        dim=32,
        hidden_dim=64,
        n_heads=2,
        n_layers=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    DistilBertForSequenceClassification(config).save_pretrained(path)
    tiny_wordpiece_tokenizer().save_pretrained(path)
    return path
