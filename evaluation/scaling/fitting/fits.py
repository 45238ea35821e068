"""Fits of value against compute, with a certificate of how far each number can be trusted.

Objectives are sums of squares. Power: residuals of log(y - V), weighted by ((y - V) / stderr)^2 where standard errors
are given. The others: residuals of y, weighted by 1 / stderr^2, or by 1 / y^2 (relative errors) without. The forms are
in forms.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special  # not scipy.stats, which takes a second to import

from evaluation.scaling.fitting.broken import solve_broken
from evaluation.scaling.fitting.certificate import aicc, condition, r_squared, standard_errors
from evaluation.scaling.fitting.checks import Refit, outliers, rise
from evaluation.scaling.fitting.forms import (
    FORMULAS,
    MIN_LOG_SPAN,
    MIN_POINTS,
    NUM_PARAMETERS,
    AnyCurve,
    Curve,
    Form,
    Scale,
    base_weights,
    scale_of,
)
from evaluation.scaling.fitting.profile import profile_interval
from evaluation.scaling.fitting.solver import (
    BELOW_MIN,
    Solutions,
    grid_objective,
    share_of_starts,
    solve_power,
    solve_power_constant,
)
from evaluation.scaling.points import Array, Columns, Interval

Status = Literal[
    "ok",
    # without numbers:
    "invalid",  # values or computes that are not finite and positive
    "too_few_points",
    "degenerate",  # the values, or the computes, are (nearly) all equal
    "not_decreasing",  # value does not fall with compute
    "one_size",  # all points are of one model size: a learning curve, not a scaling law
    # with numbers that are not to be trusted:
    "outliers",  # points that do not belong to the others pull the fit
    "not_monotone",  # the value rises again
    "unidentified",  # the points do not determine the parameters
    "no_break",  # the law without a break fits about as well
    "misfit",  # another form describes the same points far better
]
# The constant counts as unknown where its interval covers this share of what is possible.
UNIDENTIFIED_WIDTH = 0.5
_BREAK_LEVEL = 0.999  # quantile of F; on unbroken laws its levels were found to hold (broken.py)
_SMALLEST = 1e-100  # value


@dataclass(frozen=True)
class Fit:
    """A fitted law and its certificate. Numbers that the status forbids are None."""

    form: Form
    status: Status
    message: str  # why the status is what it is, in plain words; empty for "ok"
    num_points: int
    curve: AnyCurve | None = None
    exponent_stderr: float | None = None  # from the curvature at the optimum, points taken as independent
    objective: float | None = None  # weighted sum of squares at the optimum
    chi2_per_dof: float | None = None  # with standard errors only: > 1 means more scatter than they explain
    r2_log: float | None = None  # of log(y - c)
    r2_linear: float | None = None
    share_of_starts: float | None = None  # of the starting exponents, those that lead to this optimum
    condition_number: float | None = None  # of the scaled normal equations at the optimum
    constant_interval: Interval | None = None  # 95 % profile interval of c, points taken as independent
    aicc: float | None = None  # of log residuals: comparable between forms fitted to the same points
    outliers: tuple[int, ...] = ()  # numbers of the points that do not belong to the others

    @property
    def num_parameters(self) -> int:
        return NUM_PARAMETERS[self.form]


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
    if form == "power":
        fitted = _fit_power(columns, fixed)
    elif form == "power_constant":
        fitted = _fit_power_constant(columns, confidence)
    else:
        fitted = _fit_broken(columns)
    return _checked(fitted, columns, fixed)


def _refusal(columns: Columns, form: Form, constant: float) -> tuple[Status, str] | None:
    """The status of points that no law can be fitted to."""
    x, y = columns.compute, columns.value
    bad = ~(np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0))
    if bad.any():
        return "invalid", f"{int(bad.sum())} of {len(x)} values or computes are not finite and positive."
    if len(y) > 0 and not (y.min() > _SMALLEST and y.max() < 1 / _SMALLEST):
        return "invalid", f"values from {y.min():g} to {y.max():g} cannot be squared: choose another unit."
    if not np.isfinite(constant) or (len(y) > 0 and y.min() <= constant):
        return "invalid", f"the constant {constant:g} is not below the smallest value {y.min():g}."
    if len(x) < MIN_POINTS[form]:
        plural = "" if len(x) == 1 else "s"
        return "too_few_points", f"{len(x)} point{plural}; this form needs at least {MIN_POINTS[form]}."
    num_computes = len(np.unique(x))
    if num_computes < MIN_POINTS[form] - 1:
        return "degenerate", f"only {num_computes} different computes: they do not determine {FORMULAS[form]}."
    if scale_of(x).span < MIN_LOG_SPAN:
        return "degenerate", f"the computes differ by a factor of only {x.max() / x.min():.3g}."
    if np.ptp(y) <= 1e-12 * y.max():
        return "degenerate", "all values are equal: there is nothing to fit."
    t = scale_of(x).t(x)
    weights = base_weights(y, columns.stderr, "power", constant)
    if solve_power(t, np.log(y - constant), weights[None]).beta[0] <= 0:
        return "not_decreasing", "the value does not fall with compute."
    return None


def _checked(fitted: Fit, columns: Columns, constant: float) -> Fit:
    """The fit with its outliers, its information criterion, and the status that the points call for."""
    assert fitted.curve is not None
    x, y = columns.compute, columns.value
    information = aicc(fitted.curve, x, y, fitted.num_parameters)
    strange: list[int] = []
    if fitted.form != "broken":  # which can follow a strange point wherever it lies
        weights = base_weights(y, columns.stderr, fitted.form, constant)
        scale = np.ones_like(y) if fitted.form == "power" else y
        strange = outliers(_refit(columns, fitted.form, constant), weights, scale)
    fitted = dataclasses.replace(fitted, aicc=information, outliers=tuple(strange))
    order = np.argsort(x, kind="stable")
    # Three strange points at the end are no accident: they are judged with the others.
    kept = order if set(order[-3:]) <= set(strange) else np.array([i for i in order if i not in strange])
    risen = rise(np.log(x[kept]), np.log(y[kept]), base_weights(y, columns.stderr, "power")[kept])
    if risen is not None:
        message = f"the value rises again with compute, by about {np.expm1(risen):.1%}: no decreasing law describes it."
        return dataclasses.replace(fitted, status="not_monotone", message=message)
    if strange:
        named = ", ".join(f"{y[i]:.4g} at {x[i]:.3g}" for i in strange[:3]) + (", ..." if len(strange) > 3 else "")
        message = (
            f"{len(strange)} of {len(x)} points do not belong to the law of the others ({named}): mend or drop them."
        )
        return dataclasses.replace(fitted, status="outliers", message=message)
    return fitted


def _refit(columns: Columns, form: Form, constant: float) -> Refit:
    """The form's residuals and derivatives at all points when it is fitted to some of them."""
    y, weights = columns.value, base_weights(columns.value, columns.stderr, form, constant)
    t = scale_of(columns.compute).t(columns.compute)

    def refit(active: NDArray[np.bool_]) -> tuple[Array, Array]:
        rows = np.where(active, weights, 0.0)[None]
        if form == "power":
            s = solve_power(t, np.log(y - constant), rows)
            return np.log(y - constant) - np.log(s.amplitude[0]) + s.beta[0] * t, _power_jacobian(t)
        s = solve_power_constant(t, y, rows, np.zeros(1), np.array([y[active].min() * BELOW_MIN]))
        e = s.amplitude[0] * np.exp(-s.beta[0] * t)
        return y - s.constant[0] - e, _constant_jacobian(t, e, float(y.mean()))

    return refit


def _power_jacobian(t: Array) -> Array:
    """Of log(y - c) by (log A, beta): [n, 2]."""
    return np.stack([np.ones_like(t), -t], axis=1)


def _constant_jacobian(t: Array, e: Array, unit: float) -> Array:
    """Of y by (c / mean y, log A, beta), with e = A exp(-beta t): [n, 3]."""
    return np.stack([np.full_like(t, unit), e, -t * e], axis=1)


def _fit_power(columns: Columns, constant: float) -> Fit:
    x, y = columns.compute, columns.value
    scale, weights = scale_of(x), base_weights(y, columns.stderr, "power", constant)
    t = scale.t(x)
    solutions = solve_power(t, np.log(y - constant), weights[None])
    curve = _curve(solutions, scale, x, constant)
    jacobian = _power_jacobian(t)
    objective, dof = float(solutions.objective[0]), len(x) - 2
    has_errors = columns.stderr is not None
    stderr = float(standard_errors(jacobian, weights, objective, dof, has_errors)[1]) / scale.span
    status: Status = "ok"
    message = ""
    if curve.exponent <= special.stdtrit(dof, 0.975) * stderr:
        status, message = "unidentified", "the exponent's 95 % interval includes 0."
    return Fit(
        "power", status, message, len(x), curve, stderr, objective, objective / dof if has_errors else None,
        *r_squared(y, curve(x), curve.constant), 1.0, condition(jacobian, weights),
    )  # fmt: skip


def _fit_power_constant(columns: Columns, confidence: float) -> Fit:
    x, y = columns.compute, columns.value
    scale, weights = scale_of(x), base_weights(y, columns.stderr, "power_constant")
    t, upper = scale.t(x), np.array([y.min() * BELOW_MIN])
    solutions = solve_power_constant(t, y, weights[None], np.zeros(1), upper)
    starts = grid_objective(t, y, weights[None], np.zeros(1), upper)[0]
    curve = _curve(solutions, scale, x)
    objective, dof = float(solutions.objective[0]), len(x) - 3
    jacobian = _constant_jacobian(t, solutions.amplitude[0] * np.exp(-solutions.beta[0] * t), float(y.mean()))
    has_errors = columns.stderr is not None
    stderr = float(standard_errors(jacobian, weights, objective, dof, has_errors)[2]) / scale.span
    noise = max(1.0, objective / dof) if has_errors else objective / dof
    threshold = objective + noise * float(special.fdtri(1, dof, confidence))
    interval = profile_interval(t, y, weights, best=curve.constant, upper=float(upper[0]), threshold=threshold)
    status, message = _constant_status(interval, float(upper[0]), bool(solutions.at_edge[0]))
    return Fit(
        "power_constant", status, message, len(x), curve, stderr, objective,
        objective / dof if has_errors else None,
        *r_squared(y, curve(x), curve.constant), share_of_starts(starts), condition(jacobian, weights), interval,
    )  # fmt: skip


def _fit_broken(columns: Columns) -> Fit:
    x, y = columns.compute, columns.value
    scale, weights = scale_of(x), base_weights(y, columns.stderr, "broken")
    solution = solve_broken(scale.t(x), y, weights)
    curve = solution.curve(scale.log_min, scale.span, _reference(x))
    dof = len(x) - NUM_PARAMETERS["broken"]
    status: Status = "ok"
    message = ""
    if solution.f_statistic(len(x)) < special.fdtri(3, dof, _BREAK_LEVEL):
        status, message = "no_break", "the law without a break fits about as well."
    elif stuck := [name for name in solution.at_bound if name != "constant"]:  # no constant is as good as any
        status, message = "unidentified", f"at the end of its range: {', '.join(stuck)}."
    return Fit(
        "broken", status, message, len(x), curve, None, solution.objective,
        solution.objective / dof if columns.stderr is not None else None,
        *r_squared(y, curve(x), curve.constant), solution.share_of_starts, solution.condition_number,
    )  # fmt: skip


def _constant_status(interval: Interval, upper: float, at_edge: bool) -> tuple[Status, str]:
    low, high = interval
    if at_edge:
        return "unidentified", "the exponent runs to the end of its range: the points do not bend as this form does."
    if high - low >= UNIDENTIFIED_WIDTH * upper:
        return "unidentified", f"any constant from {low:.4g} to {high:.4g} fits about as well."
    if high >= upper:
        return "unidentified", "the constant is only bounded by the lowest value."
    return "ok", ""


def _curve(solutions: Solutions, scale: Scale, compute: Array, constant: float = 0.0) -> Curve:
    beta, reference = float(solutions.beta[0]), _reference(compute)
    amplitude = float(solutions.amplitude[0] * np.exp(-beta * scale.t(reference)))
    return Curve(beta / scale.span, float(solutions.constant[0]) + constant, amplitude, reference)


def _reference(compute: Array) -> float:
    return float(np.exp(np.log(compute).mean()))
