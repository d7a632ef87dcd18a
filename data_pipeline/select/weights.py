"""From the datasets' sizes to their weights in training: pure functions, one formula each.

Sizes are tokens (any unit, the same for all). Weights sum to 1. `epochs_of` tells what weights mean.
"""

import math
from collections.abc import Mapping, Sequence


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


def quality_weighted(sizes: Sequence[float], quality: Sequence[float], strength: float = 1.0) -> list[float]:
    """p_i = n_i * q_i ** strength / sum_j n_j * q_j ** strength, with q_i the mean quality score of dataset i."""
    return normalized([size * score ** strength for size, score in zip(sizes, quality, strict=True)])


def attribute_weights(tokens: Mapping[str, float], wanted: Mapping[str, float],
                      groups: Mapping[str, str] | None = None) -> dict[str, float]:
    """How often to take a document with each value of an attribute: rate_v = wanted_g / share_g, largest rate 1.

    `tokens`: tokens there are of each value; `wanted`: share of training that each group should have; `groups`: the
    group of each value, each its own where not given. Fine-grained (no groups) suits quality, where levels differ;
    grouped suits domains, where 27 classes are too few tokens each to weigh one by one (Parmar et al. 2024,
    arXiv:2407.06380). Values of a group keep their natural proportions.
    """
    group_of = {value: (groups or {}).get(value, value) for value in tokens}
    there: dict[str, float] = {}
    for value, count in tokens.items():
        there[group_of[value]] = there.get(group_of[value], 0.0) + count
    unknown = set(wanted) - set(there)
    if unknown or set(there) - set(wanted):
        raise ValueError(f"groups wanted {sorted(wanted)} are not those of the data {sorted(there)}: name the same.")
    total, asked = math.fsum(there.values()), math.fsum(wanted.values())
    rate = {group: (wanted[group] / asked) / (count / total) if count else 0.0 for group, count in there.items()}
    largest = max(rate.values())
    return {value: rate[group] / largest for value, group in group_of.items()}


def epochs_of(weights: Sequence[float], sizes: Sequence[float], budget: float) -> list[float]:
    """e_i = p_i * budget / n_i: how often each dataset is seen in `budget` tokens of training."""
    return [weight * budget / size for weight, size in zip(weights, sizes, strict=True)]


def normalized(values: Sequence[float]) -> list[float]:
    """Shares of the sum."""
    total = math.fsum(values)
    return [value / total for value in values]
