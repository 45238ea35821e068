"""One form fitted in many rounds at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.fitting.broken import solve_broken, solve_broken_rounds
from evaluation.scaling.fitting.forms import MIN_LOG_SPAN, MIN_POINTS, Form, Scale, base_weights, scale_of
from evaluation.scaling.fitting.solver import BELOW_MIN, solve_power, solve_power_constant
from evaluation.scaling.points import Array


@dataclass(frozen=True)
class Question:
    """What is asked of every round."""

    form: Form
    constant: float  # known constant of the form `power`
    reference_compute: float  # where the amplitude is taken
    max_compute: float  # of the points that were fitted: predictions are at multiples of it
    band_compute: Array  # [m]
    factors: tuple[float, ...] = (10.0, 100.0)  # of the largest compute, for the predictions


@dataclass(frozen=True)
class Draws:
    """Many data sets at the same computes."""

    compute: Array  # [n]
    value: Array  # [n], or [R, n] where every round has values of its own
    stderr: Array | None  # [n]
    counts: Array  # [R, n] how often a point takes part
    centre: tuple[Array, Array]  # what the rounds scatter about: values [n], and which of them are fitted [n]


@dataclass(frozen=True)
class Rounds:
    """The fits of the rounds that have one."""

    parameters: dict[str, Array]  # by name: [V]
    band: Array  # [V, m]
    predictions: Array  # [V, factors]


def solve_rounds(draws: Draws, question: Question) -> Rounds:
    """Fit every round; those whose points do not determine the form, or do not fall, are left out."""
    valid = _determined(draws, question.form)
    counts = draws.counts[valid]
    value = draws.value if draws.value.ndim == 1 else draws.value[valid]
    scale = scale_of(draws.compute)
    t, at = scale.t(draws.compute), np.concatenate([question.band_compute, targets(question)])
    # Standard errors belong to what was measured, not to what is drawn: a lucky draw is not a more precise one.
    weighed = value if draws.stderr is None else draws.centre[0]
    weights = counts * base_weights(weighed, draws.stderr, question.form, question.constant)
    if question.form == "broken":
        return _broken_rounds(draws, value, weights, question, at)
    if question.form == "power":
        above = np.where(value > question.constant, value - question.constant, np.nan)
        weights = np.where(np.isfinite(above), weights, 0.0)
        solutions = solve_power(t, np.log(np.where(np.isfinite(above), above, 1.0)), weights)
    else:
        lowest = np.where(counts > 0, value, np.inf).min(axis=1, initial=np.inf)
        solutions = solve_power_constant(t, value, weights, np.zeros(len(counts)), lowest * BELOW_MIN)
    kept = np.isfinite(solutions.objective) & (solutions.beta > 0) & (solutions.amplitude > 0)
    beta, amplitude = solutions.beta[kept], solutions.amplitude[kept]
    constant = solutions.constant[kept] + question.constant
    curves = constant[:, None] + amplitude[:, None] * np.exp(-beta[:, None] * scale.t(at))
    parameters = {"exponent": beta / scale.span, "amplitude": _amplitude(beta, amplitude, scale, question)}
    if question.form != "power":
        parameters["constant"] = constant
    m = len(question.band_compute)
    return Rounds(parameters, curves[:, :m], curves[:, m:])


def _broken_rounds(draws: Draws, value: Array, weights: Array, question: Question, at: Array) -> Rounds:
    scale = scale_of(draws.compute)
    t_all, t = scale.t(at), scale.t(draws.compute)
    expected, fitted = draws.centre
    starts = solve_broken(t, expected, fitted * base_weights(expected, draws.stderr, question.form)).basins
    found = solve_broken_rounds(t, value, weights, starts)
    kept = np.isfinite(found.objective) & (found.amplitude > 0)
    curves = found.values(t_all)[kept]
    theta = found.theta[kept]
    names = ("exponent_below", "exponent_above", "break_compute", "sharpness")
    columns = (
        theta[:, 0] / scale.span, theta[:, 1] / scale.span,
        np.exp(scale.log_min + theta[:, 2] * scale.span), np.exp(theta[:, 3]) * scale.span,
    )  # fmt: skip
    m = len(question.band_compute)
    parameters = dict(zip(names, columns, strict=True)) | {"constant": found.constant[kept]}
    return Rounds(parameters, curves[:, :m], curves[:, m:])


def targets(question: Question) -> Array:
    """The computes at which a prediction is wanted."""
    return question.max_compute * np.array(question.factors)


def _amplitude(beta: Array, amplitude: Array, scale: Scale, question: Question) -> Array:
    return np.asarray(amplitude * np.exp(-beta * scale.t(question.reference_compute)))


def _determined(draws: Draws, form: Form) -> NDArray[np.bool_]:
    """Rounds with enough different computes, far enough apart, to determine the form: [R]."""
    order = np.argsort(draws.compute, kind="stable")
    log_compute = np.log(draws.compute[order])
    starts = np.flatnonzero(np.diff(log_compute, prepend=-np.inf) > 0)  # where a new compute begins
    present = np.add.reduceat(draws.counts[:, order], starts, axis=1) > 0  # [R, computes]
    x = log_compute[starts]
    span = np.where(present, x, -np.inf).max(axis=1) - np.where(present, x, np.inf).min(axis=1)
    return np.asarray((present.sum(axis=1) >= MIN_POINTS[form] - 1) & (span >= MIN_LOG_SPAN))
