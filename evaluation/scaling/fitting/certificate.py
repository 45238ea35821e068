"""What a least-squares fit says of itself: standard errors, conditioning, explained scatter, information."""

from __future__ import annotations

import math

import numpy as np

from evaluation.scaling.fitting.forms import AnyCurve
from evaluation.scaling.points import Array

_EXACT = 1e-24  # mean square of log residuals that is rounding


def condition(jacobian: Array, weights: Array) -> float | None:
    """Condition number of the normal equations [p, p] scaled to a unit diagonal; None where they are singular."""
    number = float(np.linalg.cond(_normal(jacobian, weights)[0]))
    return number if np.isfinite(number) else None


def standard_errors(jacobian: Array, weights: Array, objective: float, dof: int, has_errors: bool) -> Array:
    """Of the parameters [p]; given errors are inflated where the scatter exceeds them, never deflated.

    Args:
        jacobian: of the residuals' model by the parameters [n, p].
        weights: [n].
    """
    normal, lengths = _normal(jacobian, weights)
    noise = objective / dof
    covariance = np.linalg.pinv(normal, hermitian=True) * (max(1.0, noise) if has_errors else noise)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(np.maximum(np.diag(covariance), 0.0)) / lengths)


def r_squared(y: Array, fitted: Array, constant: float) -> tuple[float, float]:
    """R² of log(y - c), and of y; unweighted."""
    log_y, log_fitted = np.log(y - constant), np.log(fitted - constant)
    log_r2 = 1 - np.sum((log_y - log_fitted) ** 2) / np.sum((log_y - log_y.mean()) ** 2)
    return float(log_r2), float(1 - np.sum((y - fitted) ** 2) / np.sum((y - y.mean()) ** 2))


def aicc(curve: AnyCurve, compute: Array, value: Array, num_parameters: int) -> float | None:
    """Akaike's criterion with its small-sample correction (Hurvich & Tsai 1989), of log residuals; lower is better.

    One measure for all forms, whatever weights they were fitted with. None where there are too few points for it;
    minus infinity where the fit is exact.
    """
    n, k = len(value), num_parameters + 1  # the scatter is a parameter too
    squares = float(np.sum(np.log(value / curve(compute)) ** 2))
    if n - k - 1 < 1:
        return None
    if squares <= _EXACT * n:
        return -math.inf
    return n * math.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _normal(jacobian: Array, weights: Array) -> tuple[Array, Array]:
    """Normal equations with unit diagonal, and the lengths of the columns."""
    weighted = jacobian * np.sqrt(weights)[:, None]
    lengths = np.linalg.norm(weighted, axis=0)
    unit = weighted / np.where(lengths > 0, lengths, 1.0)
    return unit.T @ unit, lengths
