"""What a policy says of itself, tried before anything is trained on it. What doesn't hold is one line.

Failure modes: a policy fails late or silently, because its tokenizer has tokens without an embedding, a prompt is
longer than its positions, or its cache is not of the kind that sampling needs.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plaudit.errors import ConfigError, NotFinite
from plaudit.policy.head import HALVES
from plaudit.policy.model import Policy
from plaudit.policy.samples import Samples
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.policy import GenerationSettings

FAILURES = (RuntimeError, TypeError, AttributeError, IndexError, KeyError, ValueError, NotImplementedError)
"""What a model raises that was not made for what it is asked to do."""


def check_tokenizer_fits(
    tokenizer: Tokenizer, model: PreTrainedModel, source: str, texts: Iterable[str] = (), *, setting: str = "policy"
) -> None:
    """Raises `ConfigError` where the tokenizer has tokens without an embedding that `texts` need, or is another's.

    Some models are published with a token or two that they have no embedding for, and that no text holds.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if getattr(model, "is_quantized", False):
        rows = model.config.get_text_config().vocab_size
    if 2 * len(tokenizer) < rows:
        raise ConfigError(
            f"{setting}={source!r}: its tokenizer knows {len(tokenizer)} tokens and the model {rows}; they don't "
            "belong together: copy the tokenizer files of the model it was made from into the directory"
        )
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    added, named = tokenizer.get_added_vocab(), tokenizer.all_special_tokens
    needed = [token for token in beyond if token not in added or (token in named and _is_written(tokenizer, token))]
    needed = needed or [token for text in texts for token in beyond if token in text] if beyond else []
    if needed:
        raise ConfigError(
            f"{setting}={source!r}: token {needed[0]!r} of its tokenizer has number {beyond[needed[0]]}, and the model "
            f"has embeddings for 0 to {rows - 1} alone; enlarge it with "
            f"model.resize_token_embeddings({max(beyond.values()) + 1}) and save it, or remove the token"
        )


def _is_written(tokenizer: Tokenizer, token: str) -> bool:
    """Whether texts get this token without holding it: to begin, end or pad them."""
    roles = ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token", "unk_token")
    return any(getattr(tokenizer, role, None) == token for role in roles)


def max_positions(model: PreTrainedModel) -> int | None:
    """How long a text the model takes, in tokens; None where its configuration names no bound."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_room(
    model: PreTrainedModel, longest_prompt: int, settings: GenerationSettings, source: str, *, setting: str = "policy"
) -> None:
    """Raises `ConfigError` where a prompt and its response need more positions than the model has."""
    positions = max_positions(model)
    needed = longest_prompt + settings.max_new_tokens - 1  # nothing is read after the last token
    if positions is not None and needed > positions:
        raise ConfigError(
            f"{setting}={source!r} has {positions} positions, and a prompt of {longest_prompt} tokens with "
            f"generation.max_new_tokens={settings.max_new_tokens} needs {needed}: lower prompts.max_tokens or "
            "generation.max_new_tokens"
        )


def room_for_prompts(model: Any, settings: GenerationSettings) -> int | None:
    """How many tokens a prompt may have so that its response fits behind it; None where the model has no bound."""
    positions = max_positions(model)
    return None if positions is None else max(0, positions - settings.max_new_tokens + 1)


def check_prompts(
    tokenizer: Tokenizer,
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    source: str,
    *,
    setting: str = "policy",
) -> None:
    """Raises `ConfigError` where a prompt has a token without an embedding, or needs more positions than there are."""
    rows = model.get_input_embeddings().weight.shape[0]
    if getattr(model, "is_quantized", False):
        rows = model.config.get_text_config().vocab_size
    largest = max(map(max, token_ids))
    if largest >= rows:
        raise ConfigError(
            f"{setting}={source!r}: prompts have the token {tokenizer.convert_ids_to_tokens([largest])[0]!r}, number "
            f"{largest}, and the model has embeddings for 0 to {rows - 1} alone; enlarge it with "
            f"model.resize_token_embeddings({len(tokenizer)}) and save it, or use another chat template"
        )
    check_room(model, max(map(len, token_ids)), settings, source)


@torch.no_grad()
def check_policy(policy: Policy, source: str) -> bool:
    """Check on two short texts that the policy is batch-invariant. Returns whether sampling may use the model's cache.

    Raises:
        ConfigError: the model computes otherwise for a text beside others, or can't compute it at all.
        NotFinite: its weights give numbers that are not finite.
    """
    name = type(policy.language_model).__name__
    autocast, policy.autocast = policy.autocast, None  # in full precision, where a difference is no rounding
    policy.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            try:
                problem = _problem_in_company(policy, source)
            except FAILURES as error:
                problem = f"{type(error).__name__}: {' '.join(str(error).split()):.160}"
            if problem:
                raise ConfigError(f"policy={source!r} ({name}) can't be trained here: {problem}; name another model")
            try:
                return _cache_is_exact(policy)
            except FAILURES:
                return False
    finally:
        policy.autocast = autocast


def _probe(policy: Policy) -> Samples:
    positions = max_positions(policy.language_model)
    config = policy.language_model.config.get_text_config()
    length = min(12, (positions or 12) - 4)
    longer = [3 + 7 * i % (config.vocab_size - 4) for i in range(length)]
    # The embedding of the model's own padding token is often zero until it learns, and would hide that it is read.
    padding = 3 if config.pad_token_id != 3 else 2
    return Samples.from_lists([longer, longer[:2]], [[1, 2, 3], [2, 1, 3]], padding, policy.device)


def _problem_in_company(policy: Policy, source: str) -> str | None:
    """Log-probabilities of two texts of different lengths, together and one by one without any padding."""
    probe = _probe(policy)
    together = policy(probe).logprobs
    alone = torch.cat([policy(probe.select([row])).logprobs for row in range(len(probe))])
    if not bool(together.isfinite().all() and alone.isfinite().all()):
        raise NotFinite(
            f"policy={source!r} gives log-probabilities that are not finite: its weights are damaged; take another copy"
        )
    if bool((together - alone).abs().max() > _tolerance(policy) * alone.std().clamp(min=1e-2)):
        return "beside a longer text, a text has other log-probabilities than alone, and training takes batches"
    other = dataclasses.replace(
        probe, response_ids=probe.response_ids + torch.tensor([[0, 1, 0]], device=policy.device)
    )
    if bool((policy(other).logprobs - together)[:, 0].abs().max() > 1e-4 * alone.std().clamp(min=1e-2)):
        return "a token's log-probability depends on the tokens behind it, so it is no left-to-right language model"
    return None


def _cache_is_exact(policy: Policy) -> bool:
    """The logits of a next token: with the cache of a batch from which a row was taken, and without any."""
    probe = _probe(policy)
    with policy.generating():
        model, rows = policy.language_model, torch.tensor([1], device=policy.device)
        ids, seen = probe.query_ids, probe.query_mask
        position = (seen.cumsum(1) - 1).clamp(min=0)
        output = _ask(model, ids, seen, position, None)
        output.past_key_values.batch_select_indices(rows)
        token = torch.tensor([[5]], device=policy.device)
        seen = torch.cat([seen[rows], seen.new_ones(1, 1)], dim=1)
        cached = _ask(model, token, seen, position[rows, -1:] + 1, output.past_key_values).logits[:, -1]
        whole = torch.cat([ids[1:, probe.query_mask[1]], token], dim=1)
        plain = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[:, -1]
    return bool((cached - plain).abs().max() <= _tolerance(policy) * plain.std())


def _ask(model: PreTrainedModel, ids: Tensor, seen: Tensor, position: Tensor, cache: Any) -> Any:
    return model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _tolerance(policy: Policy) -> float:
    """Of a spread of log-probabilities. A model that sees padding is off by a large part of it."""
    rounded = getattr(policy.language_model, "is_quantized", False) or policy.language_model.dtype in HALVES
    return 0.1 if rounded else 1e-2
