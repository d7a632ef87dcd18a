"""Quantities as a person reads them: amounts, large counts, shares, durations.

Owns how they are written wherever text is made for people: consoles, reports, plans. Knows nothing of what they mean.
"""

import math


def amount(value: float) -> str:
    """Three digits, or all before the point: 0.371, 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def si(value: float) -> str:
    """Three digits and a unit: 950, 12.3 k, 3.15 M, 1.10 B, 1.40 T."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            share = value / unit
            digits = 2 if share < 9.995 else 1 if share < 99.95 else 0
            return f"{share:,.{digits}f} {name}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """Two digits at least: 41.0%, 4.2%, 0.042%."""
    return f"{100 * share:.1f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.2g}%"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 5 h 12 min, 2 d 3 h; what is not finite is unknown."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    units = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))
    large, many, small, few = next(unit for unit in units if whole >= unit[0])
    return f"{whole // large:,} {many} {whole % large // small} {few}"
