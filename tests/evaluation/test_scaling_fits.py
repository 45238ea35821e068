"""Fits: exact recovery, certificates, degenerate inputs, published tables."""

from __future__ import annotations

import numpy as np
import pytest
from scaling_points import curve_points
from scipy.optimize import minimize

from evaluation.scaling.fitting.fits import Fit, fit
from evaluation.scaling.fitting.forms import Curve, Form
from evaluation.scaling.points import columns

COMPUTE = np.geomspace(1e16, 1e21, 12)
# Peebles & Xie 2023, table 4: forward Gflops and FID-50K of the twelve DiT models after 400K steps.
DIT = (
    (0.36, 153.60), (1.41, 100.41), (6.06, 68.40), (1.42, 122.74), (5.56, 68.38), (23.01, 43.47),
    (5.01, 118.87), (19.70, 45.64), (80.71, 23.33), (7.39, 106.41), (29.05, 43.01), (118.64, 19.47),
)  # fmt: skip


def fitted(compute: object, value: object, form: Form, **changes: object) -> Fit:
    return fit(columns(curve_points(compute, value, **changes)), form)  # type: ignore[arg-type]


def curve_of(result: Fit) -> Curve:
    assert result.curve is not None, result.message
    return result.curve


@pytest.mark.parametrize("exponent", [0.02, 0.17, 0.5, 1.3])
def test_exact_power_law_is_recovered(exponent: float) -> None:
    result = fitted(COMPUTE, 7 * (COMPUTE / 1e18) ** -exponent, "power")
    curve = curve_of(result)
    assert result.status == "ok"
    assert curve.exponent == pytest.approx(exponent, rel=1e-9)
    assert curve([1e18]) == pytest.approx(7, rel=1e-9)
    assert curve.log10_coefficient == pytest.approx(np.log10(7) + 18 * exponent, rel=1e-9)
    assert result.r2_log == pytest.approx(1)


@pytest.mark.parametrize(
    ("exponent", "constant"), [(0.05, 3.0), (0.17, 3.4), (0.22, 4.0), (0.2, 0.0), (0.5, 1.0), (1.5, 2.0)]
)
def test_exact_power_law_with_constant_is_recovered(exponent: float, constant: float) -> None:
    result = fitted(COMPUTE, constant + 2 * (COMPUTE / 1e16) ** -exponent, "power_constant")
    curve = curve_of(result)
    assert result.status == "ok"
    assert curve.exponent == pytest.approx(exponent, rel=1e-6)
    assert curve.constant == pytest.approx(constant, abs=1e-6)
    assert result.share_of_starts == 1
    assert result.constant_interval == pytest.approx((constant, constant), abs=1e-6)


def test_the_papers_trend_lines_at_the_papers_compute() -> None:
    """FID = 4.00 + (2.5e-25 C)^-0.22: numbers as small as 1e-25 do no harm."""
    compute = np.geomspace(1e19, 1e21, 9)
    curve = curve_of(fitted(compute, 4.0 + (2.5e-25 * compute) ** -0.22, "power_constant"))
    assert curve.constant == pytest.approx(4.0, abs=1e-6)
    assert curve.exponent == pytest.approx(0.22, rel=1e-6)
    assert -curve.log10_coefficient / curve.exponent == pytest.approx(np.log10(2.5e-25), rel=1e-6)


def test_units_of_compute_and_value_change_nothing() -> None:
    rng = np.random.default_rng(0)
    value = (2 + 3 * (COMPUTE / 1e16) ** -0.3) * np.exp(rng.normal(0, 0.01, len(COMPUTE)))
    first, second = (fitted(COMPUTE * k, value * m, "power_constant") for k, m in ((1, 1), (1e-15, 1e3)))
    assert curve_of(second).exponent == pytest.approx(curve_of(first).exponent, rel=1e-8)
    assert curve_of(second).constant == pytest.approx(1e3 * curve_of(first).constant, rel=1e-8)


def test_the_optimum_is_the_global_least_squares_optimum() -> None:
    """A general-purpose optimiser from many starts finds nothing better."""
    rng = np.random.default_rng(1)
    value = (1.5 + 4 * (COMPUTE / 1e16) ** -0.25) * np.exp(rng.normal(0, 0.03, len(COMPUTE)))
    error = 0.02 * value * rng.uniform(0.5, 2, len(COMPUTE))
    points = [p.__class__(**{**vars(p), "stderr": e}) for p, e in zip(curve_points(COMPUTE, value), error, strict=True)]
    result = fit(columns(points), "power_constant")
    x = np.log(COMPUTE / 1e16)

    def chi2(theta: np.ndarray) -> float:
        return float(np.sum(((value - theta[0] - np.exp(theta[1] - theta[2] * x)) / error) ** 2))

    bounds = [(0, value.min()), (-5, 5), (0, 3)]
    starts = [(c, a, b) for c in (0.1, 1.0, 1.8) for a in (0.5, 1.5) for b in (0.05, 0.3, 1)]
    best = min(minimize(chi2, s, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-12}).fun for s in starts)
    assert result.objective is not None
    assert result.objective <= best * (1 + 1e-9)
    assert result.objective == pytest.approx(chi2(_theta(result)), rel=1e-9)


def _theta(result: Fit) -> np.ndarray:
    curve = curve_of(result)
    log_amplitude = np.log(curve.amplitude) + curve.exponent * np.log(curve.reference_compute / 1e16)
    return np.array([curve.constant, log_amplitude, curve.exponent])


def test_dit_table() -> None:
    gflops, fid = np.array(DIT).T
    assert np.corrcoef(np.log(gflops), fid)[0, 1] == pytest.approx(-0.930, abs=5e-4)
    result = fitted(gflops, fid, "power")
    assert 10 ** curve_of(result).log10_coefficient == pytest.approx(137.8, abs=0.05)
    assert curve_of(result).exponent == pytest.approx(0.365, abs=5e-4)
    assert result.r2_log == pytest.approx(0.875, abs=5e-4)


def test_a_precise_point_counts_more() -> None:
    value = 5 * (COMPUTE / 1e16) ** -0.1
    value[-1] *= 1.3
    points = curve_points(COMPUTE, value, stderr=0.01)
    loose = [*points[:-1], points[-1].__class__(**{**vars(points[-1]), "stderr": 10.0})]
    assert curve_of(fit(columns(loose), "power")).exponent == pytest.approx(0.1, abs=1e-4)
    assert abs(curve_of(fit(columns(points), "power")).exponent - 0.1) > 1e-3


def test_known_constant_is_subtracted() -> None:
    points = columns(curve_points(COMPUTE, 3.4 + 2 * (COMPUTE / 1e16) ** -0.17))
    result = fit(points, "power", constant=3.4)
    assert curve_of(result).exponent == pytest.approx(0.17, rel=1e-9)
    assert curve_of(result)(1e16) == pytest.approx(5.4)
    assert fit(points, "power", constant=5.0).status == "invalid"


def test_intervals_cover_the_truth() -> None:
    """Profile interval of c, and exponent +- t * SE, over 120 noisy data sets of a bent curve."""
    rng = np.random.default_rng(2)
    compute = np.geomspace(1e16, 1e19, 12)
    truth = 2 + 3 * (compute / 1e16) ** -0.4
    covered = np.zeros(2)
    for _ in range(120):
        result = fitted(compute, truth * np.exp(rng.normal(0, 0.01, len(compute))), "power_constant")
        assert result.status == "ok"
        assert result.constant_interval is not None
        assert result.exponent_stderr is not None
        covered[0] += result.constant_interval[0] <= 2 <= result.constant_interval[1]
        covered[1] += abs(curve_of(result).exponent - 0.4) <= 2.262 * result.exponent_stderr
    assert np.all((covered / 120 > 0.90) & (covered / 120 < 0.99)), covered / 120


def test_a_plateau_bounds_the_constant_from_one_side_only() -> None:
    """Where noise exceeds what is left above the constant, c < min y is all that the points say of its upper end."""
    value = 2 + 3 * (COMPUTE / 1e16) ** -0.8 * np.ones(12)
    value *= np.exp(np.random.default_rng(4).normal(0, 0.02, 12))
    result = fitted(COMPUTE, value, "power_constant")
    assert result.status == "unidentified"
    assert "only bounded by the lowest value" in result.message


def test_a_constant_that_the_points_do_not_show_is_unidentified() -> None:
    rng = np.random.default_rng(3)
    compute = np.geomspace(1e16, 3e17, 8)
    value = (3.4 + 2 * (compute / 1e16) ** -0.17) * np.exp(rng.normal(0, 0.02, 8))
    result = fitted(compute, value, "power_constant")
    assert result.status == "unidentified"
    assert result.constant_interval is not None
    assert result.constant_interval[0] == 0


def test_noise_has_no_exponent() -> None:
    value = 5 * np.exp(np.random.default_rng(5).normal(0, 0.1, len(COMPUTE)))
    assert fitted(COMPUTE, value, "power").status in ("unidentified", "not_decreasing")


@pytest.mark.parametrize("form", ["power", "power_constant"])
@pytest.mark.parametrize(
    ("compute", "value", "status"),
    [
        (COMPUTE[:2], [5.0, 4.0], "too_few_points"),
        (COMPUTE, np.full(12, 3.0), "degenerate"),
        (np.full(12, 1e18), np.linspace(5, 4, 12), "degenerate"),
        (np.linspace(1e18, 1.01e18, 12), np.linspace(5, 4, 12), "degenerate"),
        (COMPUTE, np.linspace(3, 4, 12), "not_decreasing"),
        (COMPUTE, [np.nan, *np.linspace(5, 4, 11)], "invalid"),
        (COMPUTE, [np.inf, *np.linspace(5, 4, 11)], "invalid"),
        ([0.0, *COMPUTE[1:]], np.linspace(5, 4, 12), "invalid"),
        (COMPUTE, np.linspace(5, -4, 12), "invalid"),
        ([], [], "too_few_points"),
    ],
)
def test_degenerate_inputs_get_a_status_and_no_numbers(form: Form, compute: object, value: object, status: str) -> None:
    result = fitted(compute, value, form)
    assert result.status == status
    assert result.message
    assert result.curve is None
    assert result.r2_log is None
