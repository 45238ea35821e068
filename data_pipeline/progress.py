"""One way to show progress: a bar with rate and ETA that suits both a terminal and a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    iterable: Iterable[Any] | None = None, *, total: int | None, unit: str, description: str, scale: bool = False,
    initial: int = 0, disable: bool = False,
) -> tqdm[Any]:  # fmt: skip
    """A tqdm bar on stderr; `scale` shows units with k, M, G. In a log file it writes a line part every 5 s."""
    interval = 0.2 if sys.stderr.isatty() else 5.0
    return tqdm(
        iterable, total=total, unit=unit, desc=description, mininterval=interval, dynamic_ncols=True,
        unit_scale=scale, unit_divisor=1024 if unit == "B" else 1000, initial=initial, disable=disable,
    )  # fmt: skip


def say(line: str) -> None:
    """Print a line on stdout, above a bar that is being shown."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
