"""From documents' attributes to their weights, phases and keep sets: pure functions, one formula each."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.select.resample import Floats

YEAR = 365.25 * 86_400


def quality_rates(scores: Floats, mean_rate: float, sharpness: float = 1.0) -> Floats:
    """rate_d = min(1, c * exp(sharpness * z_d)), z the scores in standard deviations from their mean, and c such that
    the mean rate is `mean_rate`: better documents are likelier kept, none is sure to be lost."""
    if not 0 < mean_rate <= 1:
        raise ValueError(f"mean_rate {mean_rate} is not in (0, 1].")
    spread = scores.std()
    weights = np.exp(sharpness * ((scores - scores.mean()) / spread if spread > 0 else np.zeros(len(scores))))
    order = np.sort(weights)[::-1]
    # with the k largest cut at 1, c = (mean_rate * n - k) / (sum of the others); the first k that cuts no more
    others = np.append(np.cumsum(order[::-1])[::-1], 0.0)
    for full in range(len(order)):
        factor = (mean_rate * len(order) - full) / others[full]
        if factor * order[full] <= 1:
            return np.minimum(1.0, factor * weights)
    return np.ones(len(scores))


def curriculum_phases(difficulty: Floats, phases: int, *, easy_first: bool = True) -> npt.NDArray[np.int64]:
    """phase_d = floor(phases * rank_d / n), with rank_d the place of document d from easy to hard (equal ones in
    the corpus's order): `phases` parts of equal number, which are then trained on one after the other."""
    rank = np.empty(len(difficulty), dtype=np.int64)
    rank[np.argsort(difficulty if easy_first else -difficulty, kind="stable")] = np.arange(len(difficulty))
    return rank * phases // max(len(difficulty), 1)


def temporal_weights(dates: Sequence[int | None], reference: int | None = None, half_life_years: float = 2.0,
                     undated: float = 0.5) -> Floats:
    """w_d = 2 ** (-a_d / half_life_years), a_d the years from date_d to `reference` (0 for later ones; the newest date
    where not given); `undated` for documents without a date. Dates in seconds since 1970; they stay in the data."""
    known = [date for date in dates if date is not None]
    newest = reference if reference is not None else max(known, default=0)
    return np.array([undated if date is None else 2.0 ** (-max(newest - date, 0) / YEAR / half_life_years)
                     for date in dates], np.float64)


def attribute_rates(values: Sequence[str | None], rates: Mapping[str, float], other: float = 1.0,
                    groups: Mapping[str, str] | None = None) -> Floats:
    """rate_d = rates[v_d], or rates[groups[v_d]] where the value has a group, or `other` where neither is named."""
    names = groups or {}
    return np.array([rates.get(value, rates.get(names.get(value, ""), other)) if value is not None else other
                     for value in values], np.float64)


def rates_for_shares(sizes: Mapping[str, float], shares: Mapping[str, float],
                     groups: Mapping[str, str]) -> dict[str, float]:
    """rate_v = shares_g / (part of the text that group g is), the largest 1: with these each group has its share.

    `sizes`: text there is of each value; `groups`: the group of a value, each its own where not given; the values of
    a group keep their proportions. No groups suit quality, where levels differ; groups suit domains, of whose 27
    classes many have too little text to be weighed one by one (Parmar et al. 2024, arXiv:2407.06380). Raises
    ValueError when the shares are not of the groups that are there.
    """
    group_of = {value: groups.get(value, value) for value in sizes}
    there: dict[str, float] = {}
    for value, count in sizes.items():
        there[group_of[value]] = there.get(group_of[value], 0.0) + count
    if set(shares) != set(there):
        raise ValueError(f"shares are of {', '.join(sorted(shares))}, the documents' are {', '.join(sorted(there))}")
    total, asked = math.fsum(there.values()), math.fsum(shares.values())
    rate = {group: (shares[group] / asked) / (count / total) if count else 0.0 for group, count in there.items()}
    largest = max(rate.values())
    return {value: rate[group] / largest for value, group in group_of.items()}
