"""A plain text table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Columns aligned to the right except those in `left`; columns without any content are left out."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in (header, *rows)) for i in used}
    rule = ["-" * widths.get(i, 0) for i in range(len(header))]
    lines = [
        "  ".join(row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in used)
        for row in (header, rule, *rows)
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)
