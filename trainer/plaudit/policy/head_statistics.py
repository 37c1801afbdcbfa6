"""Log-probabilities and entropies from the input of a linear output head, without logits of all tokens.

Pieces of a few rows go through head and log-softmax one after another, forward and backward, in two buffers that all
pieces share. A large block for each piece would be freed between small ones that stay, and glibc's heap would grow
with every piece. The backward pass computes each piece again. Failure mode: a head that is no plain linear layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.ppo import distributions

NO_PROBABILITY = -1e4
"""Far below the log of the smallest number, and finite: 0 * -inf is no number."""


def head_statistics(
    head: nn.Linear,
    states: Tensor,
    token_ids: Tensor,
    *,
    rows: int,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    support: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of a token under each distribution, and the distribution's entropy if it is asked for.

    `states` [N, H], `token_ids` [N] and a `support` [N, ceil(V / 8)] as `distributions.pack` packs it give [N] and [N],
    in fp32 (fp64 for weights in fp64). Factors are rounded to `dtype` (default: that of the weights), products are
    summed in fp32. With z = (W x + b) / temperature (-inf outside the support) and p = softmax(z):

        log p_k = z_k - logsumexp(z)        d log p_k / dz = onehot_k - p
        H = -sum(p log p)                   dH / dz = -p (log p + H)
        dx = W^T dz / temperature,  dW = dz x^T / temperature,  db = dz / temperature

    At most `rows` rows of logits exist at once, twice.
    """
    dtype = head.weight.dtype if dtype is None else dtype
    logprobs, entropies = _HeadStatistics.apply(  # type: ignore[no-untyped-call]
        states, head.weight, head.bias, token_ids, support, (rows, dtype, temperature), entropy
    )
    return logprobs, entropies


class _Pieces:
    """The log-distributions of a few rows at a time."""

    def __init__(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        support: Tensor | None,
        how: tuple[int, torch.dtype, float],
    ) -> None:
        self._rows, self._dtype, self._temperature = how
        self.sums = torch.promote_types(self._dtype, torch.float32)
        """What products are summed in."""
        self._states, self._bias, self._support = states, bias, support
        self.weight = self._factor(weight)
        self._impossible = torch.full((), -torch.inf, dtype=self.sums, device=states.device)
        shape = min(self._rows, len(states)), len(weight)
        self._buffers = [torch.empty(shape, dtype=self.sums, device=states.device) for _ in range(2)]

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, start + self._rows) for start in range(0, len(self._states), self._rows))

    def log_distributions(self, piece: slice) -> tuple[Tensor, Tensor]:
        """Of these rows [n, V], and a buffer of the same size. The next call overwrites both."""
        states = self.states(piece)
        logits, result = (buffer[: len(states)] for buffer in self._buffers)
        product_into(logits, states, self.weight.t())
        if self._bias is not None:
            logits.add_(self._bias)
        if self._temperature != 1.0:
            logits.div_(self._temperature)
        if self._support is not None:
            kept = distributions.unpack(self._support[piece], logits.shape[-1])
            torch.where(kept, logits, self._impossible, out=logits)
        return torch.log_softmax(logits, -1, out=result), logits

    def states(self, piece: slice) -> Tensor:
        """[n, H], as a factor."""
        return self._factor(self._states[piece])

    def gradient(self, of_distributions: Tensor, buffer: Tensor) -> Tensor:
        """The gradient of the head's product, as a factor, from that of the log-softmax's input; both are lost."""
        if self._temperature != 1.0:
            of_distributions.div_(self._temperature)
        if self._dtype == self.sums:
            return of_distributions
        rounded = buffer.view(self._dtype)[:, : buffer.shape[1]].copy_(of_distributions)
        return rounded if rounded.is_cuda else of_distributions.copy_(rounded)

    def _factor(self, tensor: Tensor) -> Tensor:
        rounded = tensor.to(self._dtype)
        # No product of halves is summed in fp32 on CPUs; there, they are exact as fp32.
        return rounded if rounded.is_cuda else rounded.to(self.sums)


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        support: Tensor | None,
        how: tuple[int, torch.dtype, float],
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(states.device.type, enabled=False):
            pieces = _Pieces(states, weight, bias, support, how)
            logprobs = states.new_empty(len(states), dtype=pieces.sums)
            entropies = torch.empty_like(logprobs) if entropy else None
            for piece in pieces:
                log_p, buffer = pieces.log_distributions(piece)
                logprobs[piece] = log_p.gather(-1, token_ids[piece].unsqueeze(-1)).squeeze(-1)
                if entropies is not None:
                    p = torch.exp(log_p, out=buffer)
                    entropies[piece] = -p.mul_(log_p.clamp_(min=NO_PROBABILITY)).sum(-1)
        ctx.save_for_backward(states, weight, bias, token_ids, support, entropies)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, token_ids, support, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        with torch.autocast(states.device.type, enabled=False):
            pieces = _Pieces(states, weight, bias, support, ctx.how)
            of_states, of_weight, of_bias = (
                torch.zeros_like(tensor, dtype=pieces.sums) if needed else None
                for tensor, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
            )
            if of_logprobs is None:
                of_logprobs = torch.zeros(len(states), dtype=pieces.sums, device=states.device)
            of_logprobs = of_logprobs.unsqueeze(-1)
            for piece in pieces:
                log_p, buffer = pieces.log_distributions(piece)
                gradient = torch.exp(log_p, out=buffer)
                if of_entropies is None:
                    gradient.mul_(-of_logprobs[piece])
                else:
                    surprise = log_p.clamp_(min=NO_PROBABILITY).add_(entropies[piece].unsqueeze(-1))
                    gradient.mul_(surprise.mul_(-of_entropies[piece].unsqueeze(-1)).sub_(of_logprobs[piece]))
                gradient.scatter_add_(-1, token_ids[piece].unsqueeze(-1), of_logprobs[piece])
                if of_bias is not None:
                    of_bias.addmv_(gradient.t(), gradient.new_ones(len(gradient)), alpha=1 / ctx.how[2])
                factor = pieces.gradient(gradient, log_p)
                if of_states is not None:
                    product_into(of_states[piece], factor, pieces.weight)
                if of_weight is not None:
                    add_product(of_weight, factor.t(), pieces.states(piece))
        return (
            None if of_states is None else of_states.to(states.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            *(None,) * 4,
        )


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """`out` = left right, summed in the format of `out`."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total` += left right, summed in the format of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
