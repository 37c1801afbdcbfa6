"""From logits to the numbers PPO needs, without keeping a [B, T, V] log-softmax.

Log-probabilities here are those of the distribution that was sampled from: logits are divided by the temperature, and
tokens that top-k or top-p ruled out are -inf, before anything else looks at them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plaudit.ppo.shapes import require_one_a_row, require_rank, require_same_shape


def sampling_logits(logits: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Logits of the sampling distribution, [..., V] in fp32. `support` [..., V] is True on tokens that could be chosen.

    Raises `ValueError` for different shapes.
    """
    if support is not None:
        require_same_shape(logits=logits, support=support)
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits if support is None else logits.masked_fill(~support, -torch.inf)


def truncation(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Which tokens top-k, then top-p, leave to choose from: [..., V] bool, at least one per row.

    `logits` are already divided by the temperature. `top_k=0` and `top_p=1` keep everything. Ties with the k-th token
    stay, as do tokens whose predecessors, likeliest first, have less than `top_p` of the probability.
    """
    support = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        support = logits >= logits.topk(top_k).values[..., -1:]
    if top_p < 1.0:
        ordered, order = logits.masked_fill(~support, -torch.inf).sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p
        keep[..., 0] = True
        support = support & torch.zeros_like(support).scatter(-1, order, keep)
    return support


def pack(support: Tensor) -> Tensor:
    """Eight tokens to a byte: [..., V] bool gives [..., ceil(V / 8)] uint8, token v as bit v % 8 of byte v // 8."""
    bits = functional.pad(support.to(torch.uint8), (0, -support.shape[-1] % 8))
    bits = bits.view(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    places = torch.arange(8, dtype=torch.uint8, device=support.device)
    return torch.sum(bits << places, -1, dtype=torch.uint8)


def unpack(packed: Tensor, vocabulary: int) -> Tensor:
    """The [..., V] bool that `pack` packed."""
    places = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) & places).bool().flatten(-2)[..., :vocabulary]


def token_statistics(logits: Tensor, token_ids: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probability of a token under each distribution, and the distribution's entropy if it is asked for.

    log p(token) = z_token - logsumexp(z) and H = -sum(p log p), in nats; `logits` [N, V] and `token_ids` [N] give [N]
    and [N]. Goes through a few rows at a time, forward and backward, so that nothing but the logits and their gradient
    is ever as large as they are.

    Raises:
        ValueError: the logits are not [N, V], or there are not as many tokens as rows.
    """
    require_rank(2, logits=logits)
    require_one_a_row(logits, "logits", token_ids=token_ids)
    logprobs, entropies = _TokenStatistics.apply(logits, token_ids, entropy)  # type: ignore[no-untyped-call]
    return logprobs, entropies


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logprobs = logits.new_empty(len(logits), dtype=torch.float32)
        entropies = torch.empty_like(logprobs) if entropy else None
        # Kept for the gradient in place of the logits, which are not needed for one.
        kept = torch.empty_like(logits, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for rows in _few_rows(logits):
            log_distribution = torch.log_softmax(logits[rows].float(), -1, out=None if kept is None else kept[rows])
            logprobs[rows] = log_distribution.gather(-1, token_ids[rows].unsqueeze(-1)).squeeze(-1)
            if entropies is not None:
                entropies[rows] = _minus_dot(log_distribution.exp(), _finite(log_distribution))
        ctx.save_for_backward(kept, token_ids, entropies)
        ctx.set_materialize_grads(False)
        ctx.dtype = logits.dtype
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        # d log p_k / dz = onehot_k - p;  dH / dz = -p (log p + H)
        kept, token_ids, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        result = torch.empty_like(kept, dtype=ctx.dtype)
        for rows in _few_rows(kept):
            probabilities = torch.exp(kept[rows], out=result[rows] if result.dtype == kept.dtype else None)
            slope = torch.zeros_like(entropies[rows]) if of_logprobs is None else -of_logprobs[rows]
            slope = slope.unsqueeze(-1)
            if of_entropies is not None:
                surprise = kept[rows] + entropies[rows].unsqueeze(-1)
                slope = surprise.mul_(-of_entropies[rows].unsqueeze(-1)).add_(slope)
            gradient = probabilities.mul_(slope)
            if of_logprobs is not None:
                gradient.scatter_add_(-1, token_ids[rows].unsqueeze(-1), of_logprobs[rows].unsqueeze(-1))
            if result.dtype != kept.dtype:
                result[rows] = gradient
        return result, None, None


def _few_rows(logits: Tensor) -> Iterator[slice]:
    """Slices of rows that fit a CPU's cache, or keep a GPU busy, with their temporaries."""
    elements = 2**18 if logits.device.type == "cpu" else 2**26
    size = max(1, elements // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _minus_dot(probabilities: Tensor, log_distribution: Tensor) -> Tensor:
    """-sum(p log p) of each row; `probabilities` are lost."""
    if probabilities.is_cuda:
        # cuBLAS has no fast product for one vector a row.
        return -probabilities.mul_(log_distribution).sum(-1)
    dot: Tensor = torch.linalg.vecdot(probabilities, log_distribution)
    return -dot


def _finite(log_distribution: Tensor) -> Tensor:
    """In place: tokens that cannot be emitted have log p = -inf, and 0 * -inf is no number."""
    return log_distribution.clamp_(min=torch.finfo(torch.float32).min)
