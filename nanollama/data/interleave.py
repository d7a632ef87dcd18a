"""Which set row g of a mixture comes from, and which of that set's rows it is: a function of the weights.

Owns the index map. At every prefix each set has had its share of the rows to within less than one row, and
row g is found in constant time, so a run can be entered at any step. Knows nothing of files, seeds or hosts.

A later change of weights fits without repeating or skipping a row: from row g on, take set and position from
a new map at index - g, and add `counts(g)` of the old one to the position.
"""

import heapq
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

RESOLUTION = 100_000  # the longest pattern; weights that need a longer one are rounded to 1 / RESOLUTION


class Interleave:
    """index -> (set, position), periodic: set i has `shares[i]` of every `period` rows."""

    def __init__(self, weights: Sequence[float]):
        """Errors: ValueError when a weight is not positive, or less than 1 / RESOLUTION of their sum."""
        self.shares = _integer_shares(weights)
        self.period = sum(self.shares)
        self._set = _pattern(self.shares)
        self._position = np.zeros(self.period, np.int64)
        for number in range(len(self.shares)):
            self._position[self._set == number] = np.arange(self.shares[number])

    def __len__(self) -> int:
        return sys.maxsize  # rows never end: sets are repeated

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Set of row `index`, and how many rows of that set come before it."""
        periods, place = divmod(index, self.period)
        number = int(self._set[place])
        return number, periods * self.shares[number] + int(self._position[place])

    def counts(self, index: int) -> list[int]:
        """Rows of each set among the first `index` rows."""
        periods, rest = divmod(index, self.period)
        inside = np.bincount(self._set[:rest], minlength=len(self.shares))
        return [periods * share + int(more) for share, more in zip(self.shares, inside, strict=True)]


def _integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as integers with the same ratios: exact if a period of RESOLUTION or less can be."""
    if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights {list(weights)} are not all positive numbers")
    exact = [Fraction(str(weight)) for weight in weights]  # the decimal as written, not the binary
    exact = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period <= RESOLUTION:
        return tuple(int(weight * period) for weight in exact)
    shares = [int(weight * RESOLUTION) for weight in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i] * RESOLUTION)
    for number in by_remainder[: RESOLUTION - sum(shares)]:
        shares[number] += 1
    if min(shares) < 1:
        raise ValueError(f"weights {list(weights)}: the smallest is less than 1/{RESOLUTION} of their sum")
    return tuple(shares)


def _pattern(shares: Sequence[int]) -> np.ndarray:
    """One period: the set of each slot, every prefix within one row of every set's share.

    Row k of a set with share a of S must not come before slot floor(k S / a), nor after
    ceil((k + 1) S / a) - 1.
    Taking the earliest deadline among those that may come meets every deadline (Tijdeman 1980, the chairman
    assignment problem; Baruah et al. 1996, Pfair scheduling).
    """
    period = sum(shares)
    waiting = [(0, number, 0) for number in range(len(shares))]  # earliest slot, set, row of the set
    ready: list[tuple[int, int, int]] = []  # deadline, set, row of the set
    pattern = np.zeros(period, np.int32)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, number, row = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(row + 1) * period // shares[number]) - 1, number, row))
        _, number, row = heapq.heappop(ready)
        pattern[slot] = number
        if row + 1 < shares[number]:
            heapq.heappush(waiting, ((row + 1) * period // shares[number], number, row + 1))
    return pattern
