"""Scales, thinning and drawing of the report's charts."""

import math
import random
import re
import time

import pytest

from nanollama import charts
from nanollama.charts import NARROW, WIDE, Series, line_chart


def check_thinned(points, thinned, most):
    """A thinned line has both ends, every bucket's extremes and few points."""
    assert len(thinned) <= most + 4 and thinned == sorted(thinned)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert max(y for _, y in thinned) == max(y for _, y in points)
    assert min(y for _, y in thinned) == min(y for _, y in points)


def spiky(count):
    dice = random.Random(1)
    return [(float(x), dice.gauss(0, 1) + (50 if x == count // 3 + 1 else 0)) for x in range(count)]


@pytest.mark.parametrize("count", [401, 1000, 12_345])
def test_thinning_keeps_spikes(count):
    points = spiky(count)
    check_thinned(points, charts.thin(points, 400), 400)
    assert charts.thin(points[:300], 400) == points[:300]


def test_mutant_that_takes_every_nth_point_is_caught():
    points = spiky(1000)
    with pytest.raises(AssertionError):
        check_thinned(points, points[::3], 400)


def test_smoothing_neither_lags_nor_moves_the_ends():
    falling = [(float(x), 10.0 - x) for x in range(100)]
    assert all(abs(y - value) < 1e-9 for (_, y), (_, value) in zip(
        charts.smooth(falling, 0.2), falling, strict=True))  # a straight line stays where it is
    noisy = [(float(x), (-1.0) ** x) for x in range(1000)]
    assert max(abs(y) for _, y in charts.smooth(noisy, 0.1)[100:-100]) < 0.02


@pytest.mark.parametrize(("low", "high", "about", "expected"), [
    (0, 1200, 9, [0, 200, 400, 600, 800, 1000, 1200]), (2.4, 5.8, 6, [3, 4, 5]),
    (0, 0.006, 3, [0, 0.002, 0.004, 0.006]), (1.1, 1.9, 4, [1.2, 1.4, 1.6, 1.8]), (-3, 3, 3, [-2, 0, 2])])
def test_ticks_are_round_numbers_inside(low, high, about, expected):
    assert charts.ticks(low, high, about) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.25, "0.25"), (0.002, "0.002"), (3e-4, "3e-4"), (2.5e-5, "2.5e-5"), (500, "500"), (1500, "1,500"),
    (20_000, "20k"), (2.5e6, "2.5M"), (-2, "-2"), (1e9, "1B")])
def test_axis_labels(value, text):
    assert charts.number(value) == text


def test_a_steep_start_and_a_spike_leave_the_axis_to_the_rest():
    points = [(float(x), 3.0 + 7.0 * math.exp(-x / 20) + (900 if x == 700 else 0)) for x in range(1, 1001)]
    chart = line_chart("Loss", [Series("train", points)])
    top = float(re.search(r'data-y="[-\d.e+]+ ([-\d.e+]+)', chart["svg"]).group(1))
    assert 3.0 < top < 6.0 and chart["highest"] > 900 and chart["above"] >= 1


def test_what_lies_above_is_cut_where_it_leaves():
    assert charts.cut_above([(0, 20), (10, 0), (20, 20), (30, 20)], 10) == [
        [(0, 20), (5, 10)], [(15, 10), (20, 20), (30, 20)]]
    assert charts.cut_above([(0, 0), (10, 5)], 10) == []


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart("Loss", [Series("train", [(1, 3.0), (2, math.nan), (3, math.inf), (4, 2.0)], "train")])
    assert "nan" not in chart["svg"] and "inf" not in chart["svg"]
    assert chart["data"][0]["points"] == [[1, 3.0], [4, 2.0]]
    assert line_chart("Loss", [Series("train", [(1, math.nan)]), Series("validation", [])]) is None


@pytest.mark.parametrize("points", [[(5, 2.0)], [(1, 0.0), (2, 0.0)], [(0, -1.0), (1, -1.0)], [(1, 1e-30), (2, 1e30)]])
def test_odd_series_still_draw_inside_the_frame(points):
    svg = line_chart("Odd", [Series("train", points, dots=True)])["svg"]
    for frame in (WIDE, NARROW):
        drawn = re.search(rf'class="chart {frame.name}".*?</svg>', svg, re.DOTALL).group()
        numbers = [float(text) for text in re.findall(r'(?:c?[xy][12]?)="(-?[\d.]+)"', drawn)]
        assert numbers and all(-1 <= value <= frame.width + 1 for value in numbers)


def test_names_are_escaped_and_the_line_is_described():
    svg = line_chart('A "<b>', [Series("<i>train", [(1, 9.0), (8, 3.0)])], marks=[(4, "</title><script>")])["svg"]
    assert "<b>" not in svg and "<i>" not in svg and "<script>" not in svg
    assert 'role="img"' in svg and "from 9 at step 1 to 3 at step 8" in svg


def test_a_hundred_thousand_steps_draw_quickly_and_small():
    points = spiky(100_000)
    start = time.perf_counter()
    chart = line_chart("Loss", [Series("raw", points, "raw"), Series("train", charts.smooth(points), "train")])
    assert time.perf_counter() - start < 5 and len(chart["svg"]) < 100_000
