"""The smoothly broken power law: exact recovery, the global optimum, no break where there is none, many weightings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from evaluation.scaling.fitting.broken import (
    MAX_BETA,
    SHARPNESS,
    BrokenCurve,
    BrokenSolution,
    solve_broken,
    solve_broken_rounds,
)
from evaluation.scaling.fitting.broken_solver import log_fall
from evaluation.scaling.points import Array

COMPUTE = np.geomspace(1e16, 1e21, 16)
T = np.linspace(0, 1, 16)
CURVES = (  # b0, b1, d, f, c, y - c at 1e18
    BrokenCurve(0.05, 0.4, 1e18, 0.6, 0.0, 2.0, 1e18),
    BrokenCurve(0.20, 0.5, 3e18, 1.5, 3.4, 1.0, 1e18),
    BrokenCurve(0.60, 0.1, 2e18, 1.0, 0.5, 2.0, 1e18),
    BrokenCurve(0.00, 0.9, 5e17, 0.3, 0.1, 7.0, 1e18),
    BrokenCurve(0.30, 0.0, 5e18, 0.5, 0.0, 7.0, 1e18),
    BrokenCurve(0.10, 0.3, 8e18, 2.5, 1.0, 3.0, 1e18),
)


def scaled(compute: Array) -> tuple[Array, float, float]:
    logs = np.log(compute)
    span = float(np.ptp(logs))
    return (logs - logs.min()) / span, float(logs.min()), span


def solved(compute: Array, value: Array, *, with_constant: bool = True) -> tuple[BrokenSolution, BrokenCurve]:
    t, log_min, span = scaled(compute)
    solution = solve_broken(t, value, 1 / value**2, with_constant=with_constant)
    return solution, solution.curve(log_min, span, 1e18)


def noisy(curve: BrokenCurve, noise: float, seed: int, compute: Array = COMPUTE) -> Array:
    return curve(compute) * np.exp(np.random.default_rng(seed).normal(0, noise, len(compute)))


@pytest.mark.parametrize("curve", CURVES)
def test_an_exact_curve_is_recovered(curve: BrokenCurve) -> None:
    value = curve(COMPUTE)
    solution, found = solved(COMPUTE, value)
    for name, truth in vars(curve).items():
        assert getattr(found, name) == pytest.approx(truth, rel=1e-6, abs=1e-6), name
    assert found(COMPUTE) == pytest.approx(value, rel=1e-9)
    assert solution.objective < solution.rounding
    assert solution.share_of_starts > 0.2
    assert solution.condition_number is not None


def test_an_exact_curve_is_recovered_without_a_constant() -> None:
    solution, found = solved(COMPUTE, CURVES[0](COMPUTE), with_constant=False)
    assert found.constant == 0
    assert found.exponent_above == pytest.approx(0.4, rel=1e-6)
    assert "constant" in solution.at_bound


def test_the_curve_is_the_published_equation() -> None:
    """Caballero et al. 2022, equation 1 with n = 1, written out in plain powers."""
    c, b0, b1, d, f = 0.4, 0.1, 0.7, 300.0, 0.4
    x = np.geomspace(10, 1e4, 7)
    plain = c + 2.5 * x**-b0 * (1 + (x / d) ** (1 / f)) ** (-(b1 - b0) * f)
    curve = BrokenCurve(b0, b1, d, f, c, float(plain[2] - c), float(x[2]))
    assert curve(x) == pytest.approx(plain, rel=1e-12)
    assert 10**curve.log10_coefficient == pytest.approx(2.5, rel=1e-12)


def test_the_curve_does_not_overflow() -> None:
    sharp = BrokenCurve(0.1, 0.5, 1e18, 1e-3, 1.0, 2.0, 1e18)
    with np.errstate(all="raise", under="ignore"):
        low, high = sharp([1e-100, 1e300])
    assert low == pytest.approx(1 + 2 * 1e118**0.1, rel=1e-2)
    assert high == pytest.approx(1)


def test_units_of_compute_and_value_change_nothing() -> None:
    value = noisy(CURVES[1], 0.005, 0)
    (first, a), (second, b) = (solved(COMPUTE * k, value * m) for k, m in ((1.0, 1.0), (1e-15, 1e4)))
    assert second.theta == pytest.approx(first.theta, rel=1e-7)
    assert b.constant == pytest.approx(1e4 * a.constant, rel=1e-7)
    assert b.break_compute == pytest.approx(1e-15 * a.break_compute, rel=1e-7)
    assert second.objective == pytest.approx(first.objective, rel=1e-9)


def by_scipy(t: Array, y: Array, weights: Array, starts: int, rng: np.random.Generator) -> float:
    """The least objective that a general-purpose optimiser finds in all six parameters from random starts."""
    low, high = np.log(SHARPNESS)

    def residuals(p: Array) -> Array:
        phi = np.exp(p[5])
        bend = phi * np.logaddexp(0, (t - p[4]) / phi)
        fall = p[2] * t + (p[3] - p[2]) * bend
        return np.asarray(np.sqrt(weights) * (y - p[0] - np.exp(p[1] - fall)))

    bounds = [0, -15, 0, 0, t[1], low], [y.min(), 15, MAX_BETA, MAX_BETA, t[-2], high]
    best = np.inf
    for _ in range(starts):
        start = rng.uniform([0, -2, 0, 0, t[1], low], [0.99 * y.min(), 2, 6, 10, t[-2], high])
        found = least_squares(residuals, start, bounds=bounds, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12)
        best = min(best, 2 * float(found.cost))
    return best


@pytest.mark.parametrize(("curve", "noise"), [(0, 0.02), (1, 0.003), (2, 0.01), (5, 0.001)])
def test_the_optimum_is_the_global_one(curve: int, noise: float) -> None:
    value = noisy(CURVES[curve], noise, curve)
    solution, _ = solved(COMPUTE, value)
    best = by_scipy(T, value, 1 / value**2, 20, np.random.default_rng(curve))
    assert solution.objective <= best * (1 + 1e-8)
    assert solution.stationarity < 1e-6


def test_the_objective_is_the_curves_own_and_a_minimum() -> None:
    value = noisy(CURVES[0], 0.01, 3)
    solution, found = solved(COMPUTE, value)

    def objective(**changes: float) -> float:
        curve = BrokenCurve(**{**vars(found), **changes})
        return float(np.sum((curve(COMPUTE) / value - 1) ** 2))

    assert objective() == pytest.approx(solution.objective, rel=1e-9)
    for name in ("exponent_below", "exponent_above", "break_compute", "sharpness", "amplitude"):
        for factor in (0.999, 1.001):
            assert objective(**{name: getattr(found, name) * factor}) > solution.objective, name


def test_an_exact_power_law_has_no_break() -> None:
    for constant in (0.0, 2.0):
        solution, found = solved(COMPUTE, constant + 3 * (COMPUTE / 1e18) ** -0.2)
        assert solution.f_statistic(len(COMPUTE)) == 0
        assert found.constant == pytest.approx(constant, abs=1e-5)


def test_noise_is_seldom_taken_for_a_break() -> None:
    """The 95 % quantile of F with 3 and 10 degrees of freedom, 3.71: 60 unbroken laws may exceed it 8 times (99 %)."""
    law = BrokenCurve(0.2, 0.2, 1e18, 0.5, 1.0, 2.0, 1e18)
    solutions = [solved(COMPUTE, noisy(law, 0.01, seed))[0] for seed in range(60)]
    assert sum(solution.f_statistic(16) > 3.71 for solution in solutions) <= 8
    assert all(solution.objective <= solution.nested_objective for solution in solutions)


def test_a_real_break_is_seen() -> None:
    solution, found = solved(COMPUTE, noisy(CURVES[0], 0.01, 4))
    assert solution.f_statistic(16) > 100
    assert found.break_compute == pytest.approx(1e18, rel=0.3)


def test_bounds_are_named() -> None:
    corner = BrokenCurve(0.05, 0.4, 1e18, 1e-4, 0.0, 2.0, 1e18)
    assert "sharpness" in solved(COMPUTE, corner(COMPUTE))[0].at_bound
    # The law bends beyond the points: the break is held inside them.
    beyond = BrokenCurve(0.05, 0.4, 1e22, 0.5, 0.0, 2.0, 1e18)
    assert solved(COMPUTE, noisy(beyond, 0.001, 5))[0].at_bound


def test_points_of_equal_compute_are_merged_exactly() -> None:
    value = noisy(CURVES[1], 0.01, 6, np.tile(COMPUTE, 3))
    t = np.tile(T, 3)
    solution = solve_broken(t, value, 1 / value**2)
    curve = solution.curve(np.log(1e16), np.log(1e5), 1e18)
    assert np.sum((curve(np.tile(COMPUTE, 3)) / value - 1) ** 2) == pytest.approx(solution.objective, rel=1e-9)


def test_points_without_weight_do_not_matter() -> None:
    value = noisy(CURVES[0], 0.01, 7)
    kept = np.arange(16) % 5 != 2
    whole = solve_broken(T, value, np.where(kept, 1 / value**2, 0.0))
    part = solve_broken(T[kept], value[kept], 1 / value[kept] ** 2)
    assert whole.theta == pytest.approx(part.theta, rel=1e-9)
    assert whole.objective == pytest.approx(part.objective, rel=1e-9)


def test_rounds_are_the_fits_of_their_weightings() -> None:
    rng = np.random.default_rng(8)
    value = noisy(CURVES[0], 0.01, 8)
    counts = np.vstack([np.ones(16), rng.multinomial(16, np.full(16, 1 / 16), size=12)])
    solution = solve_broken(T, value, 1 / value**2)
    rounds = solve_broken_rounds(T, value, counts / value**2, solution.basins)
    assert rounds.objective[0] == pytest.approx(solution.objective, rel=1e-9)
    assert rounds.theta[0] == pytest.approx(solution.theta, rel=1e-6)
    for i in range(1, 13):
        if (counts[i] > 0).sum() < 7:
            assert np.isnan(rounds.objective[i])
            continue
        alone = solve_broken(T, value, counts[i] / value**2)
        assert rounds.objective[i] == pytest.approx(alone.objective, rel=1e-4)
        expected = alone.constant + alone.amplitude * np.exp(-log_fall(alone.theta[None], T[None])[0])
        assert rounds.values(T)[i] == pytest.approx(expected, rel=0.01)


def test_rounds_with_values_of_their_own() -> None:
    values = np.stack([noisy(CURVES[0], 0.01, seed) for seed in (9, 10)])
    basins = solve_broken(T, values[0], 1 / values[0] ** 2).basins
    rounds = solve_broken_rounds(T, values, 1 / values**2, basins)
    for i in range(2):
        alone = solve_broken(T, values[i], 1 / values[i] ** 2)
        assert rounds.objective[i] == pytest.approx(alone.objective, rel=1e-6)


def test_too_few_computes_are_no_round() -> None:
    value = CURVES[0](COMPUTE)
    weights = np.zeros((1, 16))
    weights[0, :6] = 1
    rounds = solve_broken_rounds(T, value, weights, solve_broken(T, value, 1 / value**2).basins)
    assert np.isnan(rounds.objective[0])


def test_rounds_of_many_points_agree_with_the_exact_fit() -> None:
    """More different computes than are told apart: parameters within 2 % of their spread over the rounds."""
    rng = np.random.default_rng(11)
    t = np.sort(rng.uniform(0, 1, 4000))
    value = noisy(CURVES[0], 0.02, 11, 1e16 * 1e5**t)
    counts = rng.multinomial(4000, np.full(4000, 1 / 4000), size=300).astype(float)
    solution = solve_broken(t, value, 1 / value**2)
    rounds = solve_broken_rounds(t, value, counts / value**2, solution.basins)
    assert not np.isnan(rounds.objective).any()
    spread = rounds.theta.std(axis=0)
    for i in (0, 299):  # of different blocks
        alone = solve_broken(t, value, counts[i] / value**2)
        assert np.all(np.abs(rounds.theta[i] - alone.theta) < 0.02 * spread)
