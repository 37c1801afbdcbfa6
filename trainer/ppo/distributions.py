"""From logits to the numbers PPO needs, without keeping a [B, T, V] log-softmax.

Log-probabilities here are those of the distribution that was sampled from: logits are divided by the temperature, and
tokens that top-k or top-p ruled out are -inf, before anything else looks at them.
"""

import torch
from torch import Tensor


def sampling_logits(logits: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Logits of the sampling distribution, [..., V] in fp32. `support` is True on tokens that could be chosen."""
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


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log p(token) = logit of the token - logsumexp of all; [..., V] and [...] -> [...]."""
    chosen: Tensor = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """H = logsumexp(z) - sum(softmax(z) * z) in nats, [..., V] -> [...]."""
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    return logits.logsumexp(-1) - (logits.softmax(-1) * finite).sum(-1)
