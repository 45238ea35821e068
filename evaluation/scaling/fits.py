"""Power laws of value against compute, with a certificate of how far each number can be trusted.

    power            y = a C^-b            (straight in log-log; with a known constant V: y - V = a C^-b)
    power_constant   y = c + a C^-b        (c: the irreducible part, 0 <= c < min y)

Objectives are sums of squares. Power: residuals of log(y - V), weighted by ((y - V) / stderr)^2 where standard errors
are given. Power with constant: residuals of y, weighted by 1 / stderr^2, or by 1 / y^2 (relative errors) without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, which takes a second to import

from evaluation.scaling.points import Columns
from evaluation.scaling.solver import (
    Solutions,
    grid_objective,
    share_of_starts,
    solve_power,
    solve_power_constant,
)

Array = NDArray[np.float64]

Form = Literal["power", "power_constant"]
FORMS: tuple[Form, ...] = get_args(Form)
Status = Literal[
    "ok",
    "invalid",  # values or computes that are not finite and positive
    "too_few_points",
    "degenerate",  # the values, or the computes, are (nearly) all equal
    "not_decreasing",  # value does not fall with compute
    "unidentified",  # the points do not determine the parameters
    "one_size",  # all points are of one model size: a learning curve, not a scaling law
]
# Two degrees of freedom are the least from which a scatter can be judged.
MIN_POINTS: dict[Form, int] = {"power": 4, "power_constant": 5}
# Points of nearly equal compute give any exponent at all: they must span a factor of two.
MIN_LOG_SPAN = float(np.log(2))
# The constant counts as unknown where its interval covers this share of what is possible.
UNIDENTIFIED_WIDTH = 0.5
_BELOW_MIN = 1 - 1e-9  # c < min y


@dataclass(frozen=True)
class Curve:
    """y(C) = constant + amplitude * (C / reference_compute)^-exponent."""

    exponent: float
    constant: float
    amplitude: float  # y - constant at the reference compute
    reference_compute: float  # geometric mean of the fitted computes

    def __call__(self, compute: ArrayLike) -> Array:
        ratio = np.asarray(compute, dtype=np.float64) / self.reference_compute
        return np.asarray(self.constant + self.amplitude * ratio**-self.exponent)

    @property
    def log10_coefficient(self) -> float:
        """log10 of a in y = c + a C^-b."""
        return float(np.log10(self.amplitude) + self.exponent * np.log10(self.reference_compute))


@dataclass(frozen=True)
class Fit:
    """A fitted law and its certificate. Numbers that the status forbids are None."""

    form: Form
    status: Status
    message: str  # why the status is what it is, in plain words; empty for "ok"
    num_points: int
    curve: Curve | None = None
    exponent_stderr: float | None = None  # from the curvature at the optimum, points taken as independent
    objective: float | None = None  # weighted sum of squares at the optimum
    chi2_per_dof: float | None = None  # with standard errors only: > 1 means more scatter than they explain
    r2_log: float | None = None  # of log(y - c)
    r2_linear: float | None = None
    share_of_starts: float | None = None  # of the starting exponents, those that lead to this optimum
    condition_number: float | None = None  # of the scaled normal equations at the optimum
    constant_interval: tuple[float, float] | None = None  # 95 % profile interval of c


@dataclass(frozen=True)
class Scale:
    """The map between compute and the solvers' t in [0, 1]."""

    log_min: float
    span: float

    def t(self, compute: ArrayLike) -> Array:
        return (np.log(np.asarray(compute, dtype=np.float64)) - self.log_min) / self.span

    def curve(self, solutions: Solutions, row: int, reference: float, constant: float = 0.0) -> Curve:
        beta = float(solutions.beta[row])
        amplitude = float(solutions.amplitude[row] * np.exp(-beta * self.t(reference)))
        return Curve(beta / self.span, float(solutions.constant[row]) + constant, amplitude, reference)


def scale_of(compute: Array) -> Scale:
    """The scale that maps these computes onto [0, 1]."""
    logs = np.log(compute)
    return Scale(float(logs.min()), float(logs.max() - logs.min()))


def base_weights(columns: Columns, form: Form, constant: float = 0.0) -> Array:
    """Weight of each point [n] in the form's objective."""
    y, error = columns.value, columns.stderr
    if form == "power":
        return np.ones(len(y)) if error is None else ((y - constant) / error) ** 2
    return 1 / y**2 if error is None else 1 / error**2


def fit(columns: Columns, form: Form, *, constant: float | None = None, confidence: float = 0.95) -> Fit:
    """Fit one form to all the points given.

    Args:
        constant: for `power` only: a known constant, subtracted from every value (default 0).
        confidence: of the profile interval of a fitted constant.
    """
    fixed = constant or 0.0
    refusal = _refusal(columns, form, fixed)
    if refusal is not None:
        return Fit(form, *refusal, num_points=len(columns.value))
    return _fit_power(columns, fixed) if form == "power" else _fit_power_constant(columns, confidence)


def _refusal(columns: Columns, form: Form, constant: float) -> tuple[Status, str] | None:
    """The status of points that no law can be fitted to."""
    x, y = columns.compute, columns.value
    bad = ~(np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0))
    if bad.any():
        return "invalid", f"{int(bad.sum())} of {len(x)} values or computes are not finite and positive."
    if not np.isfinite(constant) or (len(y) > 0 and y.min() <= constant):
        return "invalid", f"the constant {constant:g} is not below the smallest value {y.min():g}."
    if len(x) < MIN_POINTS[form]:
        plural = "" if len(x) == 1 else "s"
        return "too_few_points", f"{len(x)} point{plural}; this form needs at least {MIN_POINTS[form]}."
    num_computes = len(np.unique(x))
    if num_computes < MIN_POINTS[form] - 1:
        return "degenerate", f"only {num_computes} different computes: they do not determine {form}."
    if scale_of(x).span < MIN_LOG_SPAN:
        return "degenerate", f"the computes differ by a factor of only {x.max() / x.min():.3g}."
    if np.ptp(y) <= 1e-12 * y.max():
        return "degenerate", "all values are equal: there is nothing to fit."
    t = scale_of(x).t(x)
    if solve_power(t, np.log(y - constant), base_weights(columns, "power", constant)[None]).beta[0] <= 0:
        return "not_decreasing", "the value does not fall with compute."
    return None


def _fit_power(columns: Columns, constant: float) -> Fit:
    x, y = columns.compute, columns.value
    scale, weights = scale_of(x), base_weights(columns, "power", constant)
    t = scale.t(x)
    solutions = solve_power(t, np.log(y - constant), weights[None])
    curve = scale.curve(solutions, 0, _reference(x), constant)
    jacobian = np.stack([np.ones_like(t), -t], axis=1)  # of log(y - c) by (log A, beta)
    objective, dof = float(solutions.objective[0]), len(x) - 2
    stderr = float(_stderr(jacobian, weights, objective, dof, columns.stderr is not None)[1]) / scale.span
    status: Status = "ok"
    message = ""
    if curve.exponent <= special.stdtrit(dof, 0.975) * stderr:
        status, message = "unidentified", "the exponent's 95 % interval includes 0."
    return Fit(
        "power", status, message, len(x), curve, stderr, objective,
        objective / dof if columns.stderr is not None else None,
        *_r2(columns, curve), 1.0, _condition(jacobian, weights),
    )  # fmt: skip


def _fit_power_constant(columns: Columns, confidence: float) -> Fit:
    x, y = columns.compute, columns.value
    scale, weights = scale_of(x), base_weights(columns, "power_constant")
    t, unit = scale.t(x), float(y.mean())
    lower, upper = np.zeros(1), np.array([y.min() * _BELOW_MIN])
    solutions = solve_power_constant(t, y, weights[None], lower, upper)
    starts = grid_objective(t, y, weights[None], lower, upper)[0]
    curve = scale.curve(solutions, 0, _reference(x))
    objective, dof = float(solutions.objective[0]), len(x) - 3
    beta, amplitude = solutions.beta[0], solutions.amplitude[0]
    e = np.exp(-beta * t)
    # of y by (c / mean y, log A, beta)
    jacobian = np.stack([np.full_like(t, unit), amplitude * e, -amplitude * t * e], axis=1)
    stderr = float(_stderr(jacobian, weights, objective, dof, columns.stderr is not None)[2]) / scale.span
    noise = max(1.0, objective / dof) if columns.stderr is not None else objective / dof
    threshold = objective + noise * float(special.fdtri(1, dof, confidence))
    interval = _profile_interval(t, y, weights, curve.constant, float(upper[0]), threshold)
    status, message = _constant_status(interval, float(upper[0]), bool(solutions.at_edge[0]))
    return Fit(
        "power_constant", status, message, len(x), curve, stderr, objective,
        objective / dof if columns.stderr is not None else None,
        *_r2(columns, curve), share_of_starts(starts), _condition(jacobian, weights), interval,
    )  # fmt: skip


def _constant_status(interval: tuple[float, float], upper: float, at_edge: bool) -> tuple[Status, str]:
    low, high = interval
    if at_edge:
        return "unidentified", "the exponent runs to the end of its range: the points do not bend as this form does."
    if high - low >= UNIDENTIFIED_WIDTH * upper:
        return "unidentified", f"any constant from {low:.4g} to {high:.4g} fits about as well."
    if high >= upper:
        return "unidentified", "the constant is only bounded by the lowest value."
    return "ok", ""


def _profile_interval(
    t: Array, y: Array, weights: Array, best: float, upper: float, threshold: float
) -> tuple[float, float]:
    """Profile-likelihood interval of c: all c whose objective, minimised over the rest, is within the threshold."""

    def profile(constants: Array) -> Array:
        rows = np.broadcast_to(weights, (len(constants), len(weights)))
        return solve_power_constant(t, y, rows, constants, constants).objective

    outer = np.array([0.0, upper])
    within = profile(outer) <= threshold
    inner = np.full(2, best)
    for _ in range(10):  # both ends at once; `inner` is within the threshold, `outer` is not; 8 times closer a round
        rungs = np.linspace(inner, outer, 9, axis=1)  # [2, 9]
        inside = profile(rungs[:, 1:-1].ravel()).reshape(2, -1) <= threshold
        last = np.argmin(np.hstack([inside, np.zeros((2, 1), dtype=bool)]), axis=1)  # how many rungs are inside
        inner, outer = rungs[[0, 1], last], rungs[[0, 1], last + 1]
    low, high = np.where(within, [0.0, upper], inner)
    return float(low), float(high)


def _reference(compute: Array) -> float:
    return float(np.exp(np.log(compute).mean()))


def _r2(columns: Columns, curve: Curve) -> tuple[float, float]:
    """R^2 of log(y - c), and of y; unweighted."""
    y, fitted = columns.value, curve(columns.compute)
    log_y, log_fitted = np.log(y - curve.constant), np.log(fitted - curve.constant)
    log_r2 = 1 - np.sum((log_y - log_fitted) ** 2) / np.sum((log_y - log_y.mean()) ** 2)
    return float(log_r2), float(1 - np.sum((y - fitted) ** 2) / np.sum((y - y.mean()) ** 2))


def _normal(jacobian: Array, weights: Array) -> tuple[Array, Array]:
    """Normal equations with unit diagonal, and the lengths of the columns."""
    weighted = jacobian * np.sqrt(weights)[:, None]
    lengths = np.linalg.norm(weighted, axis=0)
    unit = weighted / np.where(lengths > 0, lengths, 1.0)
    return unit.T @ unit, lengths


def _condition(jacobian: Array, weights: Array) -> float | None:
    condition = float(np.linalg.cond(_normal(jacobian, weights)[0]))
    return condition if np.isfinite(condition) else None


def _stderr(jacobian: Array, weights: Array, objective: float, dof: int, has_errors: bool) -> Array:
    """Standard errors of the parameters; given errors are inflated where the scatter exceeds them, never deflated."""
    normal, lengths = _normal(jacobian, weights)
    noise = objective / dof
    covariance = np.linalg.pinv(normal, hermitian=True) * (max(1.0, noise) if has_errors else noise)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(np.maximum(np.diag(covariance), 0.0)) / lengths
