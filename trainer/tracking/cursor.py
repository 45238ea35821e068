"""What a tracker already has of a folder, as a small file in it. No mlflow here."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Cursor:
    """What the tracker already has of one run folder."""

    run: str  # MLflow's id of the run
    train_nimg: int = -1  # training records up to here
    place: list[Any] = field(default_factory=list)  # of the next one, see Place
    evals: dict[str, list[int]] = field(default_factory=dict)  # steps by metric name
    files: dict[str, list[int]] = field(default_factory=dict)  # artifacts: [size, mtime in ns]
    data: list[str] = field(default_factory=list)  # data sets
    state: list[Any] = field(default_factory=list)  # of the folder when all this was sent
    finished: bool = False


def read_cursor(path: Path) -> Cursor | None:
    """What a cursor file says; None where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Cursor(**json.loads(path.read_text()))
    return None
