"""Line charts as SVG text: crisp, themed by the page's CSS, readable without scripts.

Owns scales, ticks and their labels, thinning of long series and the SVG itself. Knows nothing of training: it
is given named points. Colours are CSS classes, so that one drawing serves light, dark and print.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

Point = tuple[float, float]


class Series(NamedTuple):
    """A named line; `role` is its CSS class: raw (thin, pale), train, validation or plain."""

    name: str
    points: Sequence[Point]
    role: str = "plain"
    dots: bool = False


class Frame(NamedTuple):
    """Size of a drawing in CSS pixels; the page shows the one that fits, so that labels keep their size."""

    name: str
    width: int
    height: int
    ticks_x: int
    ticks_y: int


WIDE, MEDIUM = Frame("wide", 1000, 360, 9, 6), Frame("medium", 680, 320, 7, 5)
NARROW = Frame("narrow", 340, 260, 4, 5)
HALF, HALF_NARROW = Frame("wide", 480, 210, 4, 4), Frame("narrow", 340, 190, 4, 4)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 26  # room for tick labels
START = 0.04  # share of the steps whose values the y axis need not reach


class Scale(NamedTuple):
    """Linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def line_chart(title: str, series: Sequence[Series], frames: Sequence[Frame] = (WIDE, MEDIUM, NARROW), *,
               marks: Sequence[tuple[float, str]] = (), zero: bool = False) -> dict[str, Any] | None:
    """Drawings of `series` for every frame, with what the page's script needs to read values off them.

    `marks` are labelled vertical lines; `zero` puts 0 on the y axis. None when there is no finite point.
    Returns {"title", "svg": Markup, "data": JSON-able, "above": values above the axis, "highest": of them}.
    """
    series = [item._replace(points=finite(item.points)) for item in series]
    series = [item for item in series if item.points]
    if not series:
        return None
    points = [point for item in series for point in item.points]
    last = max(x for x, _ in points)
    first = min(0.0, *(x for x, _ in points)) if len(points) > 1 else points[0][0]
    low, high = domain([y for _, y in points], [y for x, y in points if x > START * last])
    low = min(low, 0.0) if zero else low - 0.03 * (high - low)
    drawings = [_draw(title, series, frame, (first, last), (low, high), marks) for frame in frames]
    read = [{"name": item.name, "role": item.role, "points": [[x, y] for x, y in thin(item.points, 400)]}
            for item in series if item.role != "raw"]
    above = sorted(y for item in series for _, y in item.points if y > high and item.role in ("raw", "plain"))
    return {"title": title, "svg": Markup("").join(drawings), "data": read, "above": len(above),
            "highest": above[-1] if above else None}


def finite(points: Sequence[Point]) -> list[Point]:
    """Points whose both values are finite, in order of x."""
    return sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """About `most` points at most that look the same: lowest and highest of each bucket, and both ends."""
    if len(points) <= most:
        return list(points)
    size = 2 * len(points) / most
    kept = {points[0], points[-1]}
    for bucket in range(math.ceil(len(points) / size)):
        part = points[int(bucket * size):int((bucket + 1) * size)]
        if part:
            kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def smooth(points: Sequence[Point], share: float = 0.03) -> list[Point]:
    """Centred mean over `share` of the points; the window shrinks towards both ends, so nothing lags."""
    points = finite(points)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    half = int(share * len(points) / 2)
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        smoothed.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return smoothed


def domain(values: Sequence[float], after_start: Sequence[float]) -> tuple[float, float]:
    """Lowest value and highest one shown: neither the steep start nor a few spikes may flatten the curve."""
    low, ordered = min(values), sorted(after_start or values)
    high, usual = ordered[-1], ordered[int(0.95 * (len(ordered) - 1))]
    if len(ordered) >= 20 and usual > low:
        high = min(high, usual + 3.0 * (usual - low))
    if high <= low:  # a constant still needs a height
        return low - abs(low or 1.0) * 0.1, low + abs(low or 1.0) * 0.1
    return low, high


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high], about that many."""
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """An axis label: 0.5, 1,500, 20k, 3M, 2e-4."""
    size = abs(value)
    if size < 1e-15:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):g}{name}"
    return f"{round(value, 6):,g}" if size < 1000 else f"{value:,.0f}"


def _draw(title: str, series: Sequence[Series], frame: Frame, x_range: tuple[float, float],
          y_range: tuple[float, float], marks: Sequence[tuple[float, str]]) -> Markup:
    low, high = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[0] + 1)
    x_scale = Scale(low, high, _LEFT, frame.width - _RIGHT)
    y_scale = Scale(*y_range, frame.height - _BOTTOM, _TOP)
    label = f"{title}. " + "; ".join(
        f"{item.name}: from {item.points[0][1]:.4g} at step {item.points[0][0]:,g} to "
        f"{item.points[-1][1]:.4g} at step {item.points[-1][0]:,g}" for item in series if item.role != "raw")
    parts = [Markup(
        '<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="{:g} {:g} {:g} {:g}" '
        'data-y="{:g} {:g} {:g} {:g}">').format(
            frame.name, frame.width, frame.height, label, *x_scale, *y_scale)]
    parts += _axes(frame, x_scale, y_scale)
    for x, text in marks:
        if low <= x <= high:
            parts.append(Markup(
                '<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"><title>{3}</title></line>'
            ).format(x_scale(x), _TOP, frame.height - _BOTTOM, text))
    for item in series:
        parts.append(_line(item, frame, x_scale, y_scale))
    parts.append(Markup('<g class="cursor"></g></svg>'))
    return Markup("").join(parts)


def _axes(frame: Frame, x_scale: Scale, y_scale: Scale) -> list[Markup]:
    parts, bottom = [], frame.height - _BOTTOM
    for value in ticks(y_scale.low, y_scale.high, frame.ticks_y):
        parts.append(Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
            '<text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>').format(
                _LEFT, frame.width - _RIGHT, y_scale(value), _LEFT - 8, y_scale(value) + 4, number(value)))
    for value in ticks(x_scale.low, x_scale.high, frame.ticks_x):
        parts.append(Markup(
            '<line class="tickmark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>').format(
                x_scale(value), bottom, bottom + 4, bottom + 19, number(value)))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        _LEFT, frame.width - _RIGHT, bottom, bottom))
    return parts


def _line(item: Series, frame: Frame, x_scale: Scale, y_scale: Scale) -> Markup:
    """What lies above the axis is cut at its top edge, where the line leaves and comes back."""
    places = [(x_scale(x), y_scale(y)) for x, y in thin(item.points, frame.width)]
    path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in part) for part in cut_above(places, _TOP))
    drawn = Markup('<path class="line {}" d="{}"/>').format(item.role, path)
    if item.dots or len(places) == 1:
        drawn += Markup("").join(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
            item.role, x, y, 3.5 if len(places) <= 40 else 2) for x, y in places if y >= _TOP)
    return drawn


def cut_above(places: Sequence[Point], top: float) -> list[list[Point]]:
    """The pieces of a polyline that lie below the height `top` (y grows downwards), cut exactly there."""
    pieces: list[list[Point]] = [[]]
    for before, here in zip([None, *places[:-1]], places, strict=True):
        if before is not None and (before[1] < top) != (here[1] < top):
            share = (top - before[1]) / (here[1] - before[1])
            pieces[-1].append((before[0] + share * (here[0] - before[0]), top))
        if here[1] >= top:
            pieces[-1].append(here)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
