"""Sampling without a cache, for models without a key-value cache, such as Mamba and hybrids.

Every token recomputes the whole text. This is slow, and gives the same samples as `generation.generate`.
"""

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from plaudit.policy.endings import Endings
from plaudit.policy.generation import Draws, sample_tokens
from plaudit.policy.packing import padded
from plaudit.policy.samples import Samples
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.policy import GenerationSettings


@torch.no_grad()
def generate_uncached(
    model: PreTrainedModel,
    queries: Sequence[Sequence[int]],
    draws: Draws,
    settings: GenerationSettings,
    tokenizer: Tokenizer,
) -> Samples:
    """One response for each query, identical to `generation.generate`."""
    model.eval()
    device = next(model.parameters()).device
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    endings = Endings.of(model, tokenizer, settings)
    ends = torch.tensor(endings.tokens, dtype=torch.long, device=device)
    texts = [list(query) for query in queries]
    lengths, uniforms = draws.lengths.to(device), draws.uniforms.to(device)
    rows = torch.arange(len(texts), device=device)
    for t in range(int(lengths.max())):
        # The last token of `padded` is no input: one stands in for the token that is to be sampled.
        whole = Samples.from_lists([texts[row] for row in rows], [[0]] * len(rows), tokenizer.pad_token_id, device)
        logits = model(**padded(whole, takes_positions=takes_positions).arguments, use_cache=False).logits
        chosen = sample_tokens(logits[:, -1], uniforms[rows, t], settings)
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            texts[row].append(token)
        growing = (lengths[rows] > t + 1) & ~torch.isin(chosen, ends)
        if endings.stop:
            pairs = [(queries[row], texts[row][len(queries[row]) :]) for row in rows.tolist()]
            growing &= ~torch.tensor(endings.stop.complete(pairs), device=device)
        rows = rows[growing]
        if len(rows) == 0:
            break
    responses = [text[len(query) :] for text, query in zip(texts, queries, strict=True)]
    return Samples.from_lists(queries, responses, tokenizer.pad_token_id, device)
