"""New tokenizers and new models, for stages that train from nothing."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from plaudit.errors import ConfigError
from plaudit.settings.supervised import ModelSizes

END_OF_TEXT = "<|endoftext|>"
"""Ends a text and pads a batch, as in GPT-2."""

# Small models on one pass over the data underfit: no dropout. The tanh gelu is gelu_new in one kernel.
_BY_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.0, "seq_classif_dropout": 0.1},
}


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_length: int, classifier: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: any string can be encoded, and decoding gives it back.

    With `classifier` it marks texts as BERT does: `[CLS] text [SEP]`, pairs as `[CLS] a [SEP] b [SEP]`.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if classifier else [END_OF_TEXT]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if not classifier:
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=max_length,
        )
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, bpe.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
    )


def _config(sizes: ModelSizes, tokenizer: PreTrainedTokenizerFast, **more: Any) -> PretrainedConfig:
    # The names transformers maps onto each architecture's own (n_embd, dim, ...) through its attribute_map.
    try:
        return AutoConfig.for_model(
            sizes.model_type,
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            intermediate_size=4 * sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=sizes.max_positions,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **_BY_ARCHITECTURE.get(sizes.model_type, {}),
            **({"hidden_dim": 4 * sizes.hidden_size} if sizes.model_type == "distilbert" else {}),
            **more,
        )
    except ValueError as error:
        raise ConfigError(
            f"sizes.model_type={sizes.model_type!r} is not a model type that transformers knows"
        ) from error


def new_causal_lm(sizes: ModelSizes, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised causal language model. torch's global seed decides the weights."""
    return AutoModelForCausalLM.from_config(_config(sizes, tokenizer))


def new_classifier(
    sizes: ModelSizes, tokenizer: PreTrainedTokenizerFast, label_names: tuple[str, ...] | None
) -> PreTrainedModel:
    """A randomly initialised sequence classifier; without label names it has the one score of a pairwise model."""
    if label_names is None:
        return AutoModelForSequenceClassification.from_config(_config(sizes, tokenizer, num_labels=1))
    names = dict(enumerate(label_names))
    config = _config(sizes, tokenizer, id2label=names, label2id={name: i for i, name in names.items()})
    return AutoModelForSequenceClassification.from_config(config)
