"""A table as plain data: text for a terminal, and what the HTML report is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INDENT = "  "


@dataclass(frozen=True)
class Table:
    """Rows of cells. Columns are right-aligned except those in `left`; empty columns are left out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = ()

    @property
    def used(self) -> list[int]:
        """The columns in which some row has something; all where none has."""
        return [i for i in range(len(self.header)) if any(row[i] for row in self.rows)] or [*range(len(self.header))]

    def __str__(self) -> str:
        lines = [[row[i] for i in self.used] for row in (self.header, *self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.used))]

        def align(line: Sequence[str]) -> str:
            cells = zip(line, widths, self.used, strict=True)
            return INDENT + "  ".join(c.ljust(w) if i in self.left else c.rjust(w) for c, w, i in cells)

        aligned = [align(line) for line in lines]
        rule = INDENT + "  ".join("-" * width for width in widths)
        return "\n".join(line.rstrip() for line in (aligned[0], rule, *aligned[1:]))
