"""Quantities as a person reads them: at the edges, where a digit or a unit changes."""

import math

import pytest

from nanollama.quantities import amount, duration, percent, si


@pytest.mark.parametrize(("seconds", "text"), [
    (0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (3599.6, "1 h 0 min"),
    (86_399, "23 h 59 min"), (90_000, "1 d 1 h"), (1e9, "11,574 d 1 h"), (math.inf, "unknown")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (950, "950"), (999.4, "999"), (999.6, "1.00 k"), (12_345, "12.3 k"), (999_600, "1.00 M"),
    (1.1e9, "1.10 B"), (1.4e12, "1.40 T"), (2e15, "2,000 T")])
def test_si(value, text):
    assert si(value) == text


def test_amount_and_percent():
    assert [amount(value) for value in (0.3714, 12.34, 999.6, 1234.5)] == ["0.371", "12.3", "1,000", "1,234"]
    assert [percent(share) for share in (0, 0.41, 0.0996, 0.042)] == ["0.0%", "41.0%", "10.0%", "4.2%"]
