"""A tiny random classifier of every family that transformers classifies text with, as a Hugging Face directory.

Sizes are as small as each family allows, and weights larger than fresh ones, so that scores spread as trained ones do.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from harness.tiny_models import WORDS, tiny_tokenizer

MAX_TOKENS = 64
WEIGHT_SCALE = 4.0
_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = {**_ENCODER, "max_position_embeddings": MAX_TOKENS}
_ROBERTA = {**_ENCODER, "max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1}
_DECODER = {**_BERT, "num_key_value_heads": 1, "head_dim": 16}
_MIXTURE = {**_DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": MAX_TOKENS}
_TWO_STACKS = {
    "d_model": 32,
    **{f"{stack}_{what}": 2 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    **{f"{stack}_ffn_dim": 64 for stack in ("encoder", "decoder")},
    "max_position_embeddings": MAX_TOKENS,
    "num_labels": 3,  # what their configurations save, whatever the model has
}
_T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "decoder_start_token_id": 1}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": MAX_TOKENS}
_DISENTANGLED = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}

ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {**_BERT, "embedding_size": 16},
    "bert": _BERT,
    "big_bird": {**_BERT, "block_size": 8},
    "camembert": _ROBERTA,
    "convbert": {**_BERT, "embedding_size": 32, "head_ratio": 1, "conv_kernel_size": 3},
    "data2vec-text": _ROBERTA,
    "deberta": _DISENTANGLED,
    "deberta-v2": _DISENTANGLED,
    "distilbert": {
        "dim": 32,
        "hidden_dim": 64,
        "n_heads": 2,
        "n_layers": 2,
        "max_position_embeddings": MAX_TOKENS,
    },
    "electra": {**_BERT, "embedding_size": 32},
    "ernie": _BERT,
    "esm": {**_ROBERTA, "position_embedding_type": "absolute"},
    "eurobert": {**_DECODER, "num_key_value_heads": 2},
    "flaubert": _XLM,
    "fnet": {**_BERT, "tpu_short_seq_length": MAX_TOKENS},
    "funnel": {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1]},
    "ibert": _ROBERTA,
    "layoutlm": _BERT,
    "longformer": {**_ROBERTA, "attention_window": 8},
    "luke": {**_ROBERTA, "entity_vocab_size": 10, "entity_emb_size": 8},
    "megatron-bert": _BERT,
    "mobilebert": {**_BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {**_BERT, "local_attention": 16},
    "mpnet": _ROBERTA,
    "nystromformer": {**_BERT, "num_landmarks": 8, "segment_means_seq_len": MAX_TOKENS},
    "perceiver": {
        **{"num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1},
        **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": MAX_TOKENS},
    },
    "reformer": {
        **{"hidden_size": 32, "attention_head_size": 16, "num_attention_heads": 2, "feed_forward_size": 64},
        **{"attn_layers": ["lsh", "local"], "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
        **{"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4},
        "max_position_embeddings": MAX_TOKENS,
    },
    "rembert": {**_BERT, "input_embedding_size": 16},
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "roc_bert": {**_BERT, "enable_pronunciation": False, "enable_shape": False},
    "roformer": {**_BERT, "embedding_size": 32},
    "squeezebert": {
        **_BERT,
        "embedding_size": 32,
        **{f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")},
    },
    "xlm": _XLM,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "xmod": {**_ROBERTA, "default_language": "en_XX"},
    "yoso": {**_BERT, "use_expectation": True},
}
"""Families whose tokenizer frames a text: by [CLS] and [SEP] here."""
STACKS: dict[str, dict[str, Any]] = {
    "bart": _TWO_STACKS,
    "mbart": _TWO_STACKS,
    "mt5": _T5,
    "plbart": _TWO_STACKS,
    "t5": _T5,
    "umt5": _T5,
}
"""Encoder-decoders, which read the state at the token that ends the text."""
DECODERS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 64, "n_positions": MAX_TOKENS},
    "falcon": {**_BERT, "num_kv_heads": 1},
    "gemma": _DECODER,
    "gemma2": {**_DECODER, "sliding_window": 8},
    "gemma3_text": {**_DECODER, "sliding_window": 8},
    "glm": _DECODER,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": MAX_TOKENS,
    },
    "gpt_neox": _BERT,
    "gptj": {**_GPT2, "rotary_dim": 8},
    "jamba": {
        **_MIXTURE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
    },
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 8},
    "mixtral": _MIXTURE,
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": MAX_TOKENS},
    "nemotron": _DECODER,
    "olmo2": _DECODER,
    "openai-gpt": _GPT2,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": MAX_TOKENS,
    },
    "phi": _BERT,
    "phi3": {**_BERT, "num_key_value_heads": 2},
    "qwen2": _DECODER,
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 32},
    "qwen3": _DECODER,
    "qwen3_next": {
        **_MIXTURE,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    },
    "smollm3": _DECODER,
    "stablelm": _DECODER,
    "starcoder2": _DECODER,
    "zamba2": {
        **_DECODER,
        "num_hidden_layers": 4,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
}
"""Families that read the last token of a text."""
FAMILIES = sorted(ENCODERS | STACKS | DECODERS)


def tiny_judge(path: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A classifier of the labels NEGATIVE and POSITIVE (STACKS: and a third) with its tokenizer."""
    if family in DECODERS:
        tokenizer, settings = tiny_tokenizer(), DECODERS[family]
    else:
        settings = {**ENCODERS, **STACKS}[family]
        tokenizer = framing_tokenizer(ends_only=family in STACKS)
    tokenizer.model_max_length = int(1e30)  # as most directories have it
    tokens = {
        "vocab_size": len(tokenizer) + 1,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **({"pad_index": tokenizer.pad_token_id} if family in ("xlm", "flaubert") else {}),
        **({"cls_token_id": 0, "sep_token_id": 2} if family == "modernbert" else {}),
    }
    labels = ["NEGATIVE", "POSITIVE", "NEUTRAL"][: settings.get("num_labels", 2)]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    own = {key: value for key, value in settings.items() if key != "num_labels"}
    config = AutoConfig.for_model(family, **{**own, **tokens, **names, **changes})
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(WEIGHT_SCALE)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def framing_tokenizer(*, ends_only: bool = False) -> PreTrainedTokenizerFast:
    """A word tokenizer in RoBERTa's order: start, padding and end are 0, 1 and 2. `ends_only` adds no start."""
    vocabulary = {token: index for index, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start = "" if ends_only else "<s> "
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>", pair=f"{start}$A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )
