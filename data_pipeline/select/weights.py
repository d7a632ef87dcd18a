"""From the datasets' sizes to their weights in training: pure functions, one formula each.

Sizes are tokens (any unit, the same for all). Weights sum to 1.
"""

import math
from collections.abc import Sequence


def proportional(sizes: Sequence[float]) -> list[float]:
    """p_i = n_i / sum_j n_j: every token is seen equally often."""
    return normalized(sizes)


def alpha(sizes: Sequence[float], exponent: float = 1.3) -> list[float]:
    """p_i = n_i ** alpha / sum_j n_j ** alpha: above 1 favours large datasets, below 1 small ones."""
    return normalized([(size / max(sizes)) ** exponent for size in sizes])


def temperature(sizes: Sequence[float], heat: float = 3.3) -> list[float]:
    """p_i = n_i ** (1 / T) / sum_j n_j ** (1 / T): 1 is proportional, towards infinity uniform (mT5: 3.3)."""
    return normalized([(size / max(sizes)) ** (1 / heat) for size in sizes])


def unimax(sizes: Sequence[float], budget: float, max_epochs: float = 4.0) -> list[float]:
    """p_i = b_i / sum_j b_j; from the smallest n_i up, b_i = min(budget left / datasets left, max_epochs * n_i).

    As even as can be without seeing any dataset more than `max_epochs` times in `budget` tokens of training
    (Chung et al. 2023, arXiv:2304.09151). A budget above max_epochs * sum n is seen as that.
    """
    left, given = budget, [0.0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
    for place, index in enumerate(order):
        given[index] = min(left / (len(order) - place), max_epochs * sizes[index])
        left -= given[index]
    return normalized(given)


def normalized(values: Sequence[float]) -> list[float]:
    """Shares of the sum."""
    total = math.fsum(values)
    return [value / total for value in values]
