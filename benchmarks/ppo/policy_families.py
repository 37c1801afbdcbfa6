"""Families of policies beside plain transformers: the worst difference of our log-probabilities, as Markdown.

    python -m benchmarks.ppo.policy_families [family ...]

Tiny random models of each family, 64 positions. Texts are short (up to 22 tokens) or as long as the positions allow,
padded to a batch or packed one behind the other, and compared with plain transformers, one text at a time without
padding or cache. "Sampling": whether it uses the model's cache; "DIFFERS" where a text isn't the same in a batch.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from plaudit.errors import ConfigError
from plaudit.policy import packing
from plaudit.policy.checks import check_policy
from plaudit.policy.generation import Draws, generate
from plaudit.policy.model import Policy, load_policy, load_tokenizer
from plaudit.policy.samples import Samples
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.settings.policy import GenerationSettings, LoraSettings

POSITIONS = 64
ROUNDING = 1e-5

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = _DECODER | {"num_key_value_heads": 1}
_WIDE = _GROUPED | {"head_dim": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "codegen": _GPT | {"n_head": 4, "rotary_dim": 4},
    "ctrl": _GPT | {"dff": 64},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": POSITIONS,
    },
    "gpt_neox": _DECODER,
    "gpt_oss": _WIDE | {"intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 8},
    "mixtral": _GROUPED | {"num_local_experts": 2},
    "qwen2": _GROUPED | {"tie_word_embeddings": True},
    "qwen3": _WIDE,
    "qwen3_next": _WIDE
    | {
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
    "gemma": _WIDE,
    "gemma2": _WIDE | {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": _WIDE | {"sliding_window": 8},
    "recurrent_gemma": _DECODER | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "phi": _DECODER,
    "phi3": _DECODER | {"num_key_value_heads": 2},
    "stablelm": _DECODER | {"num_key_value_heads": 2},
    "smollm3": _GROUPED,
    "olmo2": _GROUPED,
    "cohere": _GROUPED | {"logit_scale": 0.5},
    "granite": _GROUPED | {"logits_scaling": 8.0},
    "opt": _DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": POSITIONS},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": _DECODER | {"is_decoder": True},
    "lfm2": _GROUPED | {"full_attn_idxs": [1]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 16,
        "expand": 2,
        "n_groups": 1,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": POSITIONS},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
}


def main(names: list[str]) -> None:
    """One row for each family."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| family | short, padded | short, packed | full length, padded | full length, packed | sampling |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            print(f"| {name} | {' | '.join(measured(name, Path(directory)))} |", flush=True)


def measured(name: str, directory: Path) -> list[str]:
    """The cells of one family."""
    tokenizer = load_tokenizer("imdb-gpt2-mini")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=len(tokenizer), **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | FAMILIES[name]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # a fresh model hardly tells one text from another
    model.save_pretrained(directory)
    try:
        policy = load_policy(directory, LoraSettings(enabled=False))
        cached = check_policy(policy, name)
    except ConfigError as error:
        return ["", "", "", "", f"refused: {str(error).partition(': ')[2].removesuffix('; name another model')}"]
    differences = [
        f"{difference(policy, model, samples_up_to(longest, len(tokenizer)), packs=packs):.0e}"
        if policy._packs or not packs
        else "not packed"
        for longest in (22, POSITIONS)
        for packs in (False, True)
    ]
    return [*differences, sampling(policy, tokenizer, cached)]


def samples_up_to(longest: int, vocabulary: int) -> Samples:
    """Five texts of random tokens, the longest of so many tokens with its response."""
    generator = torch.Generator().manual_seed(longest)
    lengths = [(longest - 9, 9), (2, 3), (5, 9), (longest // 2, 7), (1, 1)]
    draw = [
        [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in pair] for pair in lengths
    ]
    return Samples.from_lists([query for query, _ in draw], [response for _, response in draw], pad_token_id=0)


@torch.no_grad()
def difference(policy: Policy, model: Any, samples: Samples, *, packs: bool) -> float:
    """The largest, over all response tokens, between the policy's log-probabilities and plain transformers'."""
    kept, packing.FEW_CELLS = packing.FEW_CELLS, 0 if packs else sys.maxsize
    try:
        ours = policy(samples).logprobs
    finally:
        packing.FEW_CELLS = kept
    worst = 0.0
    for row in range(len(samples)):
        query = samples.query_ids[row][samples.query_mask[row]]
        response = samples.response_ids[row][samples.mask[row]]
        logits = model(torch.cat([query, response])[None], use_cache=False).logits[0, len(query) - 1 : -1]
        plain = logits.float().log_softmax(-1).gather(1, response[:, None])[:, 0]
        worst = max(worst, (ours[row][samples.mask[row]] - plain).abs().max().item())
    return worst


def sampling(policy: Policy, tokenizer: Any, cached: bool) -> str:
    """How it samples, and whether a text's sample is its own in any batch."""
    settings = GenerationSettings(min_new_tokens=3, max_new_tokens=12)
    queries = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16]]
    draws = Draws.of(settings, len(queries), seed=0, step=0)
    draw = generate if cached else generate_uncached
    together = draw(policy.language_model, queries, draws, settings, tokenizer)
    for i, query in enumerate(queries):
        alone = draw(policy.language_model, [query], draws.rows(i, i + 1), settings, tokenizer)
        if alone.response_ids[0].tolist() != together.response_ids[i][together.mask[i]].tolist():
            return "DIFFERS in a batch"
    return "with its cache" if cached else "without a cache"


if __name__ == "__main__":
    main(sys.argv[1:])
