"""Numbers as people read them. Standard library only."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """`3.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
