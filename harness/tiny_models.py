"""Tiny random models as Hugging Face directories, so that no test needs a hub. The same seed makes the same bytes."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
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


VOCAB_SIZE = 300
END_OF_TEXT = "<|endoftext|>"

_TEXTS = [
    "This movie was wonderful. I would watch it again with my family.",
    "This movie was terrible. I would not watch it again.",
    "The acting is bad, but the music of the film is good.",
    "A great story about a family and the things they lost.",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens, as GPT-2's: any text comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=64,
    )


CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}
"""As published with Qwen 2, Llama 3 and Gemma. The last two begin texts themselves; Gemma's takes no system message."""
_TURNS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}


CHATML = CHAT_TEMPLATES["chatml"]


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` for conversations: a template, and its two tokens beyond the 300."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": _TURNS["chatml"]})
    tokenizer.chat_template = template
    return tokenizer


def tiny_chat_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with a chat template of this style; but for ChatML's, it puts a token in front of texts."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": _TURNS[style], "bos_token": "<bos>"})
    if style != "chatml":
        begin = tokenizer.convert_tokens_to_ids("<bos>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", begin)]
        )
    tokenizer.chat_template = CHAT_TEMPLATES[style]
    return tokenizer


def tiny_llama2_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces become a mark, one is put in front and decoding takes it away; bytes; a token in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE + 40, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    # Bytes are ordinary tokens there; the trainer knows no other way to have them in the vocabulary.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_gpt2(seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    """2 layers of 32; dropout 0.1 as GPT-2 has it."""
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB_SIZE, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**config | {"bos_token_id": 0, "eos_token_id": 0} | settings)).eval()


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Rotary positions, grouped-query attention, untied head."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, num_key_value_heads=1, **settings)).eval()


def tiny_qwen2(seed: int = 0, **settings: Any) -> Qwen2ForCausalLM:
    """As Llama, with biases and a tied head."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(**_SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True} | settings)
    ).eval()


def tiny_gpt_neox(seed: int = 0, **settings: Any) -> GPTNeoXForCausalLM:
    """Parallel residuals, fused attention weights."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE, **settings)).eval()


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

ARCHITECTURES = {"gpt2": tiny_gpt2, "llama": tiny_llama, "qwen2": tiny_qwen2, "gpt_neox": tiny_gpt_neox}


def save(model: Any, path: Path, tokenizer: Any = None) -> Path:
    """Model and tokenizer as a directory that transformers loads."""
    model.save_pretrained(path)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(path)
    return path


def tiny_gpt2_dir(path: Path, seed: int = 0) -> Path:
    """A policy directory."""
    return save(tiny_gpt2(seed), path)


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
