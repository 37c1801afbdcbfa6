"""Sampling responses from a policy.

Failure modes: tokens sampled from another distribution than the scored one (dropout, another temperature); a response
with tokens of its query; a sample that depends on its batch. Every row therefore has its own random numbers, drawn
before generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plaudit.policy.endings import Endings
from plaudit.policy.samples import Samples
from plaudit.policy.texts import response_texts as decode_responses
from plaudit.policy.tokenizer import Tokenizer
from plaudit.ppo import distributions
from plaudit.settings.policy import GenerationSettings

__all__ = ["Draws", "decode_responses", "generate", "sample_tokens"]


@dataclass(frozen=True)
class Draws:
    """Random numbers of B responses: a length limit for each, and one uniform number for each token."""

    lengths: Tensor
    """[B] int, tokens."""
    uniforms: Tensor
    """[B, max_new_tokens] in [0, 1)."""

    @classmethod
    def of(cls, settings: GenerationSettings, count: int, *, seed: int, step: int) -> "Draws":
        """The draws of one step. They depend only on the arguments, so a resumed run draws the same."""
        # Two steps' seeds must differ in many bits: neighbouring seeds of one generator are related.
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63)
        if settings.draw_lengths is False:
            lengths = torch.full((count,), settings.max_new_tokens)
        else:
            lengths = torch.randint(settings.min_new_tokens, settings.max_new_tokens + 1, (count,), generator=generator)
        return cls(lengths, torch.rand(count, settings.max_new_tokens, generator=generator, dtype=torch.float64))

    def rows(self, start: int, stop: int) -> "Draws":
        """The draws of some consecutive rows."""
        return Draws(self.lengths[start:stop], self.uniforms[start:stop])


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    queries: Sequence[Sequence[int]],
    draws: Draws,
    settings: GenerationSettings,
    tokenizer: Tokenizer,
) -> Samples:
    """Samples one response for each query, all rows at once with a key-value cache.

    A response ends at its drawn length, or earlier with an end token or the token that completes a stop string, which
    is part of it. `model` is a causal LM that accepts `past_key_values`; the caller enables or disables adapters.
    """
    model.eval()
    device = next(model.parameters()).device
    samples = Samples.from_lists(queries, [[0]] * len(queries), tokenizer.pad_token_id, device)
    ids, seen = samples.query_ids, samples.query_mask
    lengths, uniforms = draws.lengths.to(device), draws.uniforms.to(device)
    steps = int(lengths.max())
    tokens = torch.full((len(queries), steps), tokenizer.pad_token_id, device=device)
    endings = Endings.of(model, tokenizer, settings)
    ends = torch.tensor(endings.tokens, dtype=torch.long, device=device)
    texts: list[list[int]] = [[] for _ in queries]
    rows = torch.arange(len(queries), device=device)
    """Unfinished rows; the model computes only these."""
    last, position = ids, (seen.cumsum(1) - 1).clamp(min=0)
    cache = None
    written = torch.zeros_like(lengths)
    for t in range(steps):
        output = model(
            input_ids=last,
            attention_mask=seen,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = sample_tokens(output.logits[:, -1], uniforms[rows, t], settings)
        tokens[rows, t] = chosen
        written[rows] = t + 1
        growing = (lengths[rows] > t + 1) & ~torch.isin(chosen, ends)
        if endings.stop:
            for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
                texts[row].append(token)
            stopped = endings.stop.complete([(queries[row], texts[row]) for row in rows.tolist()])
            growing &= ~torch.tensor(stopped, device=device)
        if not bool(growing.any()):
            break
        if not bool(growing.all()):
            keep = growing.nonzero().squeeze(1)
            rows, chosen, seen, position = rows[keep], chosen[keep], seen[keep], position[keep]
            cache.batch_select_indices(keep)
        last, position = chosen.unsqueeze(1), position[:, -1:] + 1
        seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
    return samples.answered(tokens, written)


def sample_tokens(logits: Tensor, uniforms: Tensor, settings: GenerationSettings) -> Tensor:
    """One token per row by inversion: the first whose cumulative probability exceeds the row's uniform number.

    `logits` [B, V] and `uniforms` [B] give [B]. Probabilities are summed in double precision.
    """
    logits = distributions.sampling_logits(logits, temperature=settings.temperature)
    if settings.top_k > 0 or settings.top_p < 1.0:
        support = distributions.truncation(logits, top_k=settings.top_k, top_p=settings.top_p)
        logits = distributions.sampling_logits(logits, support=support)
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniforms.double().unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
