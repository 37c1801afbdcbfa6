"""The logits of response tokens: computed at once, or in pieces of a few rows where they would be large.

With a vocabulary of 150,000 tokens the logits of 8,000 response tokens are 5 GB, and a log-softmax and a gradient as
much again. In pieces, the output head and what is asked of its logits go together: only the states [N, H] and a number
or two for each token are kept. The backward pass computes each piece again: in `head_statistics` for a plain linear
head, otherwise by checkpoints (Chen et al. 2016, "Training deep nets with sublinear memory cost"). Failure mode: a
model that changes its logits after its head, and must not go in pieces.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plaudit.policy.head import fp32_logits
from plaudit.policy.head_statistics import head_statistics
from plaudit.policy.packing import ModelInput
from plaudit.policy.samples import Samples
from plaudit.policy.transformer import bare, head_of
from plaudit.ppo import distributions

FAILURES = (RuntimeError, TypeError, ValueError)
"""What a model raises for an input that it can't take."""


@dataclass(frozen=True)
class ResponseLogits:
    """Logits [N, V] of the N response tokens of a pass, or what they are computed from."""

    states: Tensor
    """[N, H], the input of the output head."""
    whole: Tensor | None
    """[N, V], or None: then pieces are computed with `head`."""
    head: Callable[[Tensor], Tensor]
    """[n, H] gives [n, V]."""
    linear: nn.Linear | None
    """The head, if it is nothing but a linear layer."""
    dtype: torch.dtype | None
    """What the head's factors are rounded to, if not to the format of its weights."""


def response_logits(model: Any, given: ModelInput, *, autocast: torch.dtype | None, whole: bool) -> ResponseLogits:
    """One pass through a language model; its head sees response tokens alone, or none of them unless `whole`."""
    seen: list[Tensor] = []

    def keep_response_states(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0].flatten(0, 1).index_select(0, given.states))
        return ((seen[0] if whole else seen[0][:0]).unsqueeze(0), *inputs[1:])

    hook = head_of(model).register_forward_pre_hook(keep_response_states)
    try:
        with computing_in(autocast, model):
            logits = bare(model)(**given.arguments, use_cache=False).logits
    finally:
        hook.remove()
    head, linear = functools.partial(apply_head, model, autocast), head_of(model)
    if type(linear) is not nn.Linear:
        linear = None
    return ResponseLogits(seen[0], logits.squeeze(0) if whole else None, head, linear, autocast)


def apply_head(model: Any, autocast: torch.dtype | None, states: Tensor) -> Tensor:
    """The head alone, in the precision of a whole pass: [..., H] gives [..., V]."""
    with computing_in(autocast, model):
        logits: Tensor = head_of(model)(states)
    return logits


@contextmanager
def computing_in(autocast: torch.dtype | None, *models: Any) -> Iterator[None]:
    """The precision of a pass through these models; logits are fp32."""
    heads = [head_of(model) for model in models]
    # No cache: each weight is cast once a pass anyway, and a recorded graph would keep an old step's copy.
    with (
        fp32_logits(*heads, autocast=autocast),
        torch.autocast(heads[0].weight.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False),
    ):
        yield


def token_statistics(
    logits: ResponseLogits,
    tokens: Tensor,
    support: Tensor | None,
    *,
    rows: int,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `tokens` [N] under the sampling distribution and its entropies, [N] each.

    `support` is packed, [N, ceil(V / 8)].
    """
    if logits.whole is None and logits.linear is not None:
        return head_statistics(
            logits.linear,
            logits.states,
            tokens,
            rows=rows,
            dtype=logits.dtype,
            temperature=temperature,
            support=support,
            entropy=entropy,
        )

    def statistics(logits: Tensor, tokens: Tensor, packed: Tensor | None) -> tuple[Tensor, ...]:
        support = None if packed is None else distributions.unpack(packed, logits.shape[-1])
        logits = distributions.sampling_logits(logits, temperature=temperature, support=support)
        logprobs, entropies = distributions.token_statistics(logits, tokens, entropy=entropy)
        return (logprobs,) if entropies is None else (logprobs, entropies)

    results = in_pieces(statistics, (logits,), tokens, support, rows=rows)
    return results[0], results[1] if entropy else None


def in_pieces(
    work: Callable[..., tuple[Tensor, ...]], logits: Sequence[ResponseLogits], *columns: Tensor | None, rows: int
) -> tuple[Tensor, ...]:
    """What `work(*logits, *columns)` gives for all N rows: a tuple of [N, ...].

    Logits that are there already go through `work` once; others `rows` at a time, and again in a backward pass. `work`
    must treat rows one by one. Columns are [N, ...] or None.
    """
    if all(part.whole is not None for part in logits):
        return work(*(part.whole for part in logits), *columns)

    def piece(states: Sequence[Tensor], rest: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return work(*(part.head(own) for part, own in zip(logits, states, strict=True)), *rest)

    done: list[tuple[Tensor, ...]] = []
    results: tuple[Tensor, ...] = ()
    count = len(logits[0].states)
    for start in range(0, count, rows):
        chosen = slice(start, start + rows)
        given = [part.states[chosen] for part in logits], [None if c is None else c[chosen] for c in columns]
        if torch.is_grad_enabled():
            done.append(checkpoint(piece, *given, use_reentrant=False, preserve_rng_state=False))
            continue
        outputs = piece(*given)
        # Outputs kept one by one would split the memory that the logits of a piece have left.
        results = results or tuple(output.new_empty(count, *output.shape[1:]) for output in outputs)
        for result, output in zip(results, outputs, strict=True):
            result[chosen] = output
    return results or tuple(torch.cat(outputs) for outputs in zip(*done, strict=True))


def probe_samples(device: torch.device) -> Samples:
    """Two samples of different lengths, to try how a model can be asked."""
    return Samples.from_lists([[1, 2, 3], [4, 5]], [[6, 7], [7, 6, 5]], pad_token_id=0, device=device)


@torch.no_grad()
def same_logits(model: Any, plain: ModelInput, other: ModelInput, *, autocast: torch.dtype | None) -> bool:
    """Whether another form of the same input gives the logits of plain padded rows. A model is asked, not believed."""
    transformer = bare(model)
    expected = response_logits(model, plain, autocast=autocast, whole=True).whole
    try:
        got = response_logits(model, other, autocast=autocast, whole=True).whole
    except FAILURES:
        return False
    assert expected is not None
    assert got is not None
    exact = autocast is None and transformer.dtype == torch.float32 and not getattr(transformer, "is_quantized", False)
    return bool((expected - got).abs().max() < (1e-3 if exact else 3e-2) * expected.std())


@torch.no_grad()
def ends_with_its_head(model: Any, given: ModelInput, *, autocast: torch.dtype | None) -> bool:
    """Whether the model's logits are what its head gives, and nothing scales or caps them afterwards."""
    try:
        states = response_logits(model, given, autocast=autocast, whole=False).states
        logits = apply_head(model, autocast, states.unsqueeze(0)).squeeze(0)
    except FAILURES:
        return False
    expected = response_logits(model, given, autocast=autocast, whole=True).whole
    assert expected is not None
    # To the bit: where logits are small, a cap changes little.
    return torch.equal(logits, expected)
