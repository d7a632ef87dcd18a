"""The mixture's index map: every prefix within one row of every share, constant time, phases fit."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nanollama.data.interleave import RESOLUTION, Interleave

weights_of_sets = st.lists(st.integers(1, 400), min_size=1, max_size=8).map(lambda ws: [w / 100 for w in ws])


def check_prefixes(sets: Sequence[int], shares: Sequence[Fraction]) -> None:
    """After any n rows each set has had n times its share, to within less than one row."""
    counts = np.cumsum(np.eye(len(shares), dtype=np.int64)[np.asarray(sets)], axis=0)
    rows = np.arange(1, len(sets) + 1)
    for number, share in enumerate(shares):
        distance = np.abs(counts[:, number] * share.denominator - rows * share.numerator)
        assert distance.max() < share.denominator


@hypothesis.given(weights_of_sets)
def test_every_prefix_is_within_one_row_of_every_share(weights: list[float]) -> None:
    mixed = Interleave(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    sets = [mixed[index][0] for index in range(mixed.period + 5)]
    check_prefixes(sets, [Fraction(str(weight)) / total for weight in weights])


def in_blocks(weights: Sequence[int]) -> list[int]:
    return [number for number, weight in enumerate(weights) for _ in range(weight)]


def at_random(weights: Sequence[int]) -> list[int]:
    return np.random.default_rng(0).permutation(in_blocks(weights)).tolist()


@pytest.mark.parametrize("mutant", [in_blocks, at_random])
def test_prefix_check_catches(mutant: Callable[[Sequence[int]], list[int]]) -> None:
    weights = [27, 7, 66]
    with pytest.raises(AssertionError):
        check_prefixes(mutant(weights), [Fraction(weight, 100) for weight in weights])


@hypothesis.given(weights_of_sets, st.integers(0, 10**12))
def test_positions_count_the_rows_of_a_set_without_gaps(weights: list[float], start: int) -> None:
    mixed = Interleave(weights)
    following = mixed.counts(start)
    for index in range(start, start + 50):
        number, position = mixed[index]
        assert position == following[number]
        following[number] += 1
    assert following == mixed.counts(start + 50)


def test_a_change_of_weights_repeats_and_skips_nothing() -> None:
    """The recipe in the module's docstring, which a phase table will follow."""
    before, after, change = Interleave([3, 1]), Interleave([1, 1]), 10
    offsets = before.counts(change)
    seen: list[list[int]] = [[], []]
    for index in range(100):
        number, position = before[index] if index < change else after[index - change]
        seen[number].append(position + (offsets[number] if index >= change else 0))
    for positions in seen:
        assert positions == list(range(len(positions)))


def test_decimal_weights_are_exact_and_others_are_rounded() -> None:
    assert Interleave([0.27, 0.07, 0.07, 0.59]).shares == (27, 7, 7, 59)
    assert Interleave([1 / 3, 2 / 3]).shares == (1, 2)
    assert Interleave([5.0]).shares == (1,)
    rounded = Interleave([2**0.5, 3**0.5, 0.001])
    assert rounded.period == RESOLUTION
    total = 2**0.5 + 3**0.5 + 0.001
    for share, weight in zip(rounded.shares, [2**0.5, 3**0.5, 0.001], strict=True):
        assert abs(share / RESOLUTION - weight / total) <= 1 / RESOLUTION


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")], [float("inf")], [1, 1e-9]])
def test_weights_that_cannot_be_mixed_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Interleave(weights)
