"""A tiny random language model of every family that can be a policy, as a Hugging Face directory.

Weights are larger than fresh ones, so that one text is told from another.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.tiny_models import VOCAB_SIZE, save, tiny_tokenizer

POSITIONS = 64
WEIGHT_SCALE = 4.0
END_TOKENS = (0, *range(40, 60))
"""Many, so that some responses end before their drawn length."""

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 1}
_WIDE = {**_GROUPED, "head_dim": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_MAMBA2_MIXER = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

DECODERS: dict[str, dict[str, Any]] = {
    "bert": {**_DECODER, "is_decoder": True},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "codegen": {**_GPT, "n_head": 4, "rotary_dim": 4},
    "cohere": {**_GROUPED, "logit_scale": 0.5},
    "ctrl": {**_GPT, "dff": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gemma": _WIDE,
    "gemma2": {**_WIDE, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_WIDE, "sliding_window": 8},
    "glm": _WIDE,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": POSITIONS,
    },
    "gpt_neox": _DECODER,
    "gpt_oss": {
        **_WIDE,
        "intermediate_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 8,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": {**_GROUPED, "logits_scaling": 8.0},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "mixtral": {**_GROUPED, "num_local_experts": 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": POSITIONS},
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, "sliding_window": 8},
    "opt": {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi": _DECODER,
    "phi3": {**_DECODER, "num_key_value_heads": 2},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen3": _WIDE,
    "qwen3_moe": {
        **_WIDE,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "smollm3": _GROUPED,
    "stablelm": {**_DECODER, "num_key_value_heads": 2},
    "starcoder2": _GROUPED,
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
}
"""Families that attend to what is before."""
RECURRENT: dict[str, dict[str, Any]] = {
    "bamba": {**_GROUPED, **_MAMBA2_MIXER, "attn_layer_indices": [1]},
    "falcon_h1": {**_GROUPED, **_MAMBA2_MIXER, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "falcon_mamba": _MAMBA,
    "granitemoehybrid": {
        **_GROUPED,
        **_MAMBA2_MIXER,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "jamba": {
        **_GROUPED,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "lfm2": {**_GROUPED, "full_attn_idxs": [1]},
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "nemotron_h": {
        **_WIDE,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "qwen3_next": {
        **_WIDE,
        "num_hidden_layers": 4,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {**_DECODER, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": POSITIONS},
    "zamba2": {
        **_WIDE,
        "num_hidden_layers": 4,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "chunk_size": 8,
    },
}
"""Families that carry a state from token to token, in some of their layers or in all."""
OTHERS: dict[str, dict[str, Any]] = {"xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}}
"""What transformers calls a causal language model, and isn't one from left to right."""
FAMILIES = {**DECODERS, **RECURRENT, **OTHERS}


def tiny_causal_lm(family: str, seed: int = 0, **changes: Any) -> Any:
    """The bare model, in evaluation mode."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**tokens, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WEIGHT_SCALE)
    model.generation_config.eos_token_id = list(END_TOKENS)
    return model


def tiny_policy(path: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Model and tokenizer; a response may end at any of `END_TOKENS`."""
    return save(tiny_causal_lm(family, seed, **changes), path, tiny_tokenizer())
