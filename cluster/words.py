"""Tables, times and sizes as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def duration(seconds: float) -> str:
    """`3:05`, `2:10:00` or `4.2 days`."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes.removeprefix("0")


def flops(value: float) -> str:
    """`1.858e20`."""
    return f"{value:.3e}".replace("e+", "e")


def count(num: int, noun: str, plural: str | None = None) -> str:
    """`1 node`, `3 nodes`."""
    return f"{num:,} " + (noun if num == 1 else plural or f"{noun}s")
