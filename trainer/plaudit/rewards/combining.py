"""Several rewards of one response as one number. Needs only the standard library.

| combination | of the weighted rewards x_1, ..., x_n | source |
| --- | --- | --- |
| `weighted_sum` | their sum | |
| `minimum` | the smallest one | worst-case optimisation, Coste et al. 2023, arXiv 2310.02743 |
| `mean_minus_std` | mean - multiple * standard deviation (divisor n) | Eisenstein et al. 2023, arXiv 2312.09244 |

The last two trust a response no more than the judges agree on it, which slows over-optimisation of a single judge.
Judges on different scales need weights that make them comparable.

Failure mode: rewards on different scales, of which the one with the larger scale decides alone.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

Combination = Literal["weighted_sum", "minimum", "mean_minus_std"]


def combine(rewards: Sequence[float], *, combination: Combination, std_multiple: float = 1.0) -> float:
    """One number from the weighted rewards of a response, at least one. Only `mean_minus_std` uses `std_multiple`."""
    if combination == "minimum":
        return min(rewards)
    if combination == "mean_minus_std":
        mean = statistics.fmean(rewards)
        return mean - std_multiple * math.sqrt(statistics.fmean((reward - mean) ** 2 for reward in rewards))
    return sum(rewards)
