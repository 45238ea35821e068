"""Which values are the same but for rounding: sizes read off a figure, computes counted in two ways."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.points import Array

SAME = 1e-3  # of the logarithm


def distinct(logs: Array, tolerance: float = SAME) -> NDArray[np.int64]:
    """Labels [n], from 0 in ascending order; values no further apart than the tolerance from a neighbour share one."""
    order = np.argsort(logs, kind="stable")
    steps = np.diff(logs[order], prepend=logs[order[:1]]) > tolerance
    labels = np.empty(len(logs), dtype=np.int64)
    labels[order] = np.cumsum(steps)
    return labels


def num_distinct(logs: Array, tolerance: float = SAME) -> int:
    """How many values differ."""
    return int(distinct(logs, tolerance).max()) + 1 if len(logs) else 0
