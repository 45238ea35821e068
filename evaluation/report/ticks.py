"""Where the axes' ticks are, and what is written at them."""

from __future__ import annotations

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def value_ticks(low: float, high: float) -> list[float]:
    """Four to nine round ticks for a log axis, also over a narrow range such as 4.2 to 7.6."""
    if high / low > 8:
        for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            stride = max(1, round(len(decades) / 7))
            ticks = [m * 10.0**d for d in decades if d % stride == 0 for m in mantissas if low <= m * 10.0**d <= high]
            if len(ticks) >= 4:
                return ticks
    return linear_ticks(low, high)


def linear_ticks(low: float, high: float) -> list[float]:
    """Four or more ticks at multiples of a round step."""
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    for step in (magnitude, magnitude / 2, magnitude / 4, magnitude / 5, magnitude / 10):
        ticks = [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) >= 4:
            return ticks
    return ticks


def power_ticks(low: float, high: float) -> list[float]:
    """Ticks at powers of ten, with 3 between them where the range is short."""
    decades = math.log10(high / low)
    mantissas = (1,) if decades > 3.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
    stride = max(1, round(decades / 7))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in powers if d % stride == 0 for m in mantissas if low <= m * 10.0**d <= high]


def scientific(value: float) -> str:
    """10¹², 3×10¹²."""
    power = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**power
    base = f"10{str(power).translate(SUPERSCRIPTS)}"
    return base if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}×{base}"


def percent(value: float) -> str:
    """+1.5 %, −1.5 %, 0."""
    return "0" if value == 0 else f"{100 * value:+g} %".replace("-", "−")
