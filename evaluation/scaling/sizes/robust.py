"""Losses of log residuals that outliers do not rule: Huber's and the absolute one, beside least squares.

Huber (1964) is quadratic up to delta and linear beyond. Its two ends are the other losses: delta = inf is least
squares, and huber / delta goes to |r| as delta goes to 0; so one solver serves all three.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Loss = Literal["huber", "lad", "lsq"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
_TINY = 1e-300


def huber(residual: Array, delta: float) -> Array:
    """r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond; any shape."""
    size = np.abs(residual)
    inside = np.minimum(size, delta)
    return np.asarray(inside * (size - inside / 2))


def huber_pull(residual: Array, delta: float) -> Array:
    """The derivative of `huber`: r, but no further from 0 than delta."""
    return np.clip(residual, -delta, delta)


def huber_weight(residual: Array, delta: float) -> Array:
    """The weight min(1, delta / |r|) with which least squares pulls as Huber's loss does."""
    return np.minimum(1.0, delta / np.maximum(np.abs(residual), _TINY))


def objective(residual: Array, weights: Array, loss: Loss, delta: float) -> Array:
    """The sum over the last axis: of Huber's losses, of |r|, or of r^2, each times its weight."""
    if loss == "huber":
        return np.asarray((weights * huber(residual, delta)).sum(axis=-1))
    return np.asarray((weights * (np.abs(residual) if loss == "lad" else residual**2)).sum(axis=-1))
