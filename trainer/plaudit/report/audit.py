"""An audit of responses for signs of over-optimisation. Pure functions of texts and numbers.

It is an audit, not an alarm: no figure is known that warns reliably before a policy exploits its reward model. Each one
only shows what has changed. Failure modes: a figure of an empty set that looks like a good one; a change of one figure
that is read as proof.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

NGRAM = 3
KL_QUANTILES = (0.05, 0.5, 0.95)


def audit(
    texts: Sequence[str],
    *,
    rewards: Sequence[float],
    lengths: Sequence[int],
    kls: Sequence[float],
    judged: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """The audit's figures of responses to different prompts. Index i is response i in every argument.

    `length_correlation` of reward and length in tokens; `repeated_trigrams`; `distinct_share`; `kl_p05`, `kl_p50` and
    `kl_p95`, quantiles over responses in nats; `NAME/correlation` of the reward and the scores of judge NAME. A
    correlation that is not defined is left out.
    """
    result = {"repeated_trigrams": repeated_share(texts), "distinct_share": distinct_share(texts)}
    for quantile, value in zip(KL_QUANTILES, np.quantile(np.asarray(kls, dtype=np.float64), KL_QUANTILES), strict=True):
        result[f"kl_p{round(100 * quantile):02d}"] = float(value)
    pairs = {"length_correlation": lengths} | {f"{name}/correlation": scores for name, scores in judged.items()}
    found = {name: correlation(rewards, values) for name, values in pairs.items()}
    return result | {name: value for name, value in found.items() if value is not None}


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation: sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2).

    None if either has no spread. Raises `ValueError` if the counts differ.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values: a correlation is of pairs")
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    a, b = a - a.mean(), b - b.mean()
    value = float((a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    return max(-1.0, min(1.0, value))


def repeated_share(texts: Sequence[str], n: int = NGRAM) -> float:
    """Share of the word n-grams of all texts that occurred earlier in the same text; 0 if there are none.

    Words are separated by white space. A text of w words has w - n + 1 of them.
    """
    total = repeated = 0
    for text in texts:
        words = text.split()
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / total if total else 0.0


def distinct_share(texts: Sequence[str]) -> float:
    """Number of different texts, ignoring white space at the ends, divided by their number."""
    return len({text.strip() for text in texts}) / len(texts)
