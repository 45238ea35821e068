"""Least squares of the smoothly broken power law, for many starts or many weightings at once.

With t between 0 and 1 over the fitted computes, y = c + A exp(-g(t)) and
g(t) = beta0 t + (beta1 - beta0) phi log(1 + exp((t - tau) / phi)). It is linear in (c, A), which are projected out
(Golub & Pereyra 1973; Jacobian of Kaufman 1975), so four numbers are left: theta = (beta0, beta1, tau, log phi).
Levenberg-Marquardt between bounds takes every row of theta down at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evaluation.scaling.fitting.solver import BELOW_MIN

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

_ITERATIONS = 500
_SWEEP = 20  # iterations after which the rows that arrived are left alone
_DAMPING_LIMIT = 1e12  # no step is short enough to help: rounding decides
_TINY = 1e-300


@dataclass(frozen=True)
class Data:
    """Points merged by compute: t, y and weights are [P or 1, m], the constant's upper bound [P or 1]."""

    t: Array
    y: Array
    weights: Array
    upper: Array

    def rows(self, index: NDArray[np.int64]) -> Data:
        """The data of some rows; one row of data serves all."""
        return self if len(self.t) == 1 else Data(self.t[index], self.y[index], self.weights[index], self.upper[index])


@dataclass(frozen=True)
class State:
    """The best linear parameters at P thetas, and what they leave."""

    constant: Array  # [P]
    amplitude: Array  # [P] at t = 0
    objective: Array  # [P] weighted sum of squares
    residual: Array  # [P, m] y - fit
    decay: Array  # [P, m] exp(-g)
    clipped: Flags  # [P] the constant is at a bound


def merge(t: Array, y: Array, weights: Array, *, with_constant: bool, bins: int | None = None) -> tuple[Data, Array]:
    """Points of equal t as one, exactly, and the squares [R] that this takes out of the objective.

    Args:
        t: [n]. y: [n] or [R, n].
        weights: [R, n].
        with_constant: whether the constant may differ from 0.
        bins: with more different t than this, neighbours within 1 / bins are merged at their weighted mean.
    """
    values, place = np.unique(t, return_inverse=True)
    if bins is not None and len(values) > bins:
        place = np.unique((t * bins).astype(np.int64), return_inverse=True)[1]
    upper = np.where(weights > 0, y, np.inf).min(axis=1) * (BELOW_MIN if with_constant else 0.0)
    order = np.argsort(place, kind="stable")
    group = place[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    w, y, t = weights[:, order], y[..., order], t[order]
    total = np.add.reduceat(w, first, axis=1)
    share = np.where(total > 0, total, 1.0)
    mean_y, mean_t = (np.add.reduceat(w * x, first, axis=1) / share for x in (y, t))
    rest = np.einsum("rn,rn->r", w, (y - mean_y[:, group]) ** 2)
    return Data(mean_t, mean_y, total, upper), rest


def log_fall(theta: Array, t: Array) -> Array:
    """g [P, m] at thetas [P, 4] and t [P or 1, m]."""
    beta0, beta1, tau, log_phi = theta.T[:, :, None]
    phi = np.exp(log_phi)
    return np.asarray(beta0 * t + (beta1 - beta0) * phi * np.logaddexp(0, (t - tau) / phi))


def linear(theta: Array, data: Data) -> State:
    """The best (c, A) for each theta, by centred sums; c between 0 and its upper bound, A >= 0."""
    e = np.exp(-log_fall(theta, data.t))
    w = np.broadcast_to(data.weights, e.shape)
    total = w.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_e, mean_y = np.einsum("pm,pm->p", w, e) / total, (w * data.y).sum(axis=1) / total
        de = e - mean_e[:, None]
        slope = np.einsum("pm,pm->p", w * de, np.broadcast_to(data.y, e.shape)) / np.einsum("pm,pm,pm->p", w, de, de)
        c = np.clip(mean_y - slope * mean_e, 0.0, data.upper)
        c = np.where(np.isfinite(c), c, 0.0)  # no decay at all: any c fits as well
        clipped = (c <= 0) | (c >= data.upper)
        rest = data.y - c[:, None]
        amplitude = np.einsum("pm,pm->p", w * rest, e) / np.einsum("pm,pm,pm->p", w, e, e)
    amplitude = np.maximum(np.where(clipped, amplitude, slope), 0.0)
    residual = rest - amplitude[:, None] * e
    return State(c, amplitude, np.einsum("pm,pm,pm->p", w, residual, residual), residual, e, clipped)


def jacobian(theta: Array, state: State, data: Data) -> Array:
    """Derivatives of the fit by theta at fixed (c, A): [P, m, 4]."""
    beta0, beta1, tau, log_phi = theta.T[:, :, None]
    phi = np.exp(log_phi)
    z = (data.t - tau) / phi
    bend, sigmoid = phi * np.logaddexp(0, z), special.expit(z)
    difference = beta1 - beta0
    by_g = np.stack([data.t - bend, bend, -difference * sigmoid, difference * (bend - phi * z * sigmoid)], axis=2)
    return np.asarray(-state.amplitude[:, None, None] * state.decay[:, :, None] * by_g)


def normal_equations(theta: Array, state: State, data: Data) -> tuple[Array, Array]:
    """J'WJ [P, 4, 4] and J'Wr [P, 4] with (c, A) projected out; J'Wr points downhill."""
    columns = jacobian(theta, state, data)
    w = np.broadcast_to(data.weights, state.decay.shape)
    total = w.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The directions that (c, A) take up: 1 and exp(-g), or exp(-g) alone where c is at a bound.
        free = ~state.clipped[:, None]
        means = np.where(free, np.einsum("pm,pmk->pk", w, columns) / total[:, None], 0.0)
        mean_e = np.where(free[:, 0], np.einsum("pm,pm->p", w, state.decay) / total, 0.0)
        columns = columns - means[:, None, :]
        e = state.decay - mean_e[:, None]
        along = np.einsum("pm,pmk->pk", w * e, columns) / np.einsum("pm,pm,pm->p", w, e, e)[:, None]
    columns = columns - e[:, :, None] * np.where(np.isfinite(along), along, 0.0)[:, None, :]
    root = np.sqrt(w)[:, :, None]
    columns = columns * root
    turned = columns.transpose(0, 2, 1)
    return turned @ columns, (turned @ (state.residual[:, :, None] * root))[:, :, 0]


def movable(theta: Array, downhill: Array, bounds: Array) -> Flags:
    """Parameters [P, 4] that are not held by a bound which downhill points across."""
    held = ((theta <= bounds[0]) & (downhill < 0)) | ((theta >= bounds[1]) & (downhill > 0))
    return np.asarray(~held)


def descend(theta: Array, data: Data, bounds: Array) -> Array:
    """Every theta [P, 4] taken to the bottom of its basin.

    Args:
        bounds: [2, 4] least and largest values.
    """
    theta = np.clip(theta, bounds[0], bounds[1])
    damping = np.full(len(theta), 1e-2)
    left = np.arange(len(theta))
    for _ in range(_ITERATIONS // _SWEEP):
        theta[left], damping[left], arrived = _sweep(theta[left], damping[left], data.rows(left), bounds)
        left = left[~arrived]
        if len(left) == 0:
            break
    return theta


def _sweep(theta: Array, damping: Array, data: Data, bounds: Array) -> tuple[Array, Array, Flags]:
    """Some iterations of all rows: theta, damping, and which rows cannot be improved any more."""
    state = linear(theta, data)
    arrived = np.zeros(len(theta), dtype=bool)
    for _ in range(_SWEEP):
        normal, downhill = normal_equations(theta, state, data)
        step = _step(normal, np.where(movable(theta, downhill, bounds), downhill, np.nan), damping)
        trial = np.clip(theta + step, bounds[0], bounds[1])
        new = linear(trial, data)
        better = new.objective < state.objective
        gain = np.where(better, state.objective - new.objective, 0.0)
        small = np.abs(trial - theta).max(axis=1) < 1e-13
        arrived = (damping > _DAMPING_LIMIT) | small | (better & (gain <= 1e-15 * state.objective))
        damping = np.where(better, np.maximum(damping / 5, 1e-12), damping * 4)
        theta = np.where(better[:, None], trial, theta)
        state = _chosen(state, new, better)
        if arrived.all():
            break
    return theta, damping, arrived


def _step(normal: Array, downhill: Array, damping: Array) -> Array:
    """Marquardt's step [P, 4]; parameters whose slope is NaN stay."""
    held = np.isnan(downhill)
    pair_held = held[:, :, None] | held[:, None, :]
    diagonal = np.einsum("pkk->pk", normal)
    # A parameter without effect (the break's, where both exponents are equal) stays too, without a singular matrix.
    scale = np.sqrt(np.maximum(diagonal, 1e-24 * diagonal.max(axis=1, keepdims=True)) + _TINY)
    matrix = np.where(pair_held, 0.0, normal / scale[:, :, None] / scale[:, None, :])
    identity = np.eye(normal.shape[1])
    matrix = matrix + identity * (damping[:, None] + held)[:, :, None]
    right = np.where(held, 0.0, downhill / scale)
    return np.asarray(np.linalg.solve(matrix, right[:, :, None])[:, :, 0] / scale)


def _chosen(old: State, new: State, chosen: Flags) -> State:
    def pick(x: Array, y: Array) -> Array:
        return np.where(chosen if x.ndim == 1 else chosen[:, None], y, x)

    return State(
        pick(old.constant, new.constant),
        pick(old.amplitude, new.amplitude),
        pick(old.objective, new.objective),
        pick(old.residual, new.residual),
        pick(old.decay, new.decay),
        np.where(chosen, new.clipped, old.clipped),
    )
