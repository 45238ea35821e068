"""What is no law is not called one: outliers, values that rise again, forms that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from scaling_points import curve_points

from evaluation.scaling.fitting.checks import rise
from evaluation.scaling.fitting.compare import akaike_weights, compare
from evaluation.scaling.fitting.fits import Fit, fit
from evaluation.scaling.fitting.forms import FORMS, Form
from evaluation.scaling.points import columns

COMPUTE = np.geomspace(1e16, 1e20, 16)
POWER = 5 * (COMPUTE / 1e16) ** -0.15
BENT = 2 + 3 * (COMPUTE / 1e16) ** -0.3


def fitted(value: np.ndarray, form: Form, compute: np.ndarray = COMPUTE) -> Fit:
    return fit(columns(curve_points(compute, value)), form)


@pytest.mark.parametrize(("form", "truth"), [("power", POWER), ("power_constant", BENT)])
@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("strange", [(3,), (0,), (15,), (2, 9), (14, 15), (5, 6, 7)])
def test_outliers_are_found_and_named(form: Form, truth: np.ndarray, noise: float, strange: tuple[int, ...]) -> None:
    value = truth * np.exp(np.random.default_rng(1).normal(0, noise, len(truth)))
    value[list(strange)] *= 1.25
    found = fitted(value, form)
    assert found.status == "outliers"
    assert sorted(found.outliers) == list(strange)
    assert f"{len(strange)} of 16 points" in found.message


@pytest.mark.parametrize(("form", "truth"), [("power", POWER), ("power_constant", BENT)])
def test_sound_points_are_no_outliers(form: Form, truth: np.ndarray) -> None:
    """At a level of 0.001, one false alarm in 300 data sets has a chance of a quarter; three, of half a percent."""
    rng = np.random.default_rng(2)
    alarms = sum(fitted(truth * np.exp(rng.normal(0, 0.02, len(truth))), form).status == "outliers" for _ in range(300))
    assert alarms <= 2


@pytest.mark.parametrize("form", ["power", "power_constant"])
@pytest.mark.parametrize(("exponent", "rise_by"), [(0.15, 1.3), (0.3, 1.2), (0.3, 1.1)])
@pytest.mark.parametrize("num", [12, 16, 24])
def test_values_that_rise_again_are_no_law(form: Form, exponent: float, rise_by: float, num: int) -> None:
    """Falling for two thirds of the range, then rising."""
    compute = np.geomspace(1e16, 1e20, num)
    lowest = compute[2 * num // 3]
    log_rise = np.log(rise_by) / np.log(compute[-1] / lowest)
    value = np.where(
        compute <= lowest, (compute / lowest) ** -exponent, (np.maximum(compute, lowest) / lowest) ** log_rise
    )
    value = value * np.exp(np.random.default_rng(3).normal(0, 0.003, num))
    found = fitted(value, form, compute)
    assert found.status == "not_monotone"
    assert "rises again" in found.message


def test_scatter_is_no_rise() -> None:
    rng = np.random.default_rng(4)
    alarms = 0
    for truth in (POWER, BENT, 2 + 3 * (COMPUTE / 1e16) ** -1.5):
        for _ in range(200):
            noisy = np.log(truth) + rng.normal(0, 0.03, 16)
            alarms += rise(np.log(COMPUTE), noisy, np.ones(16)) is not None
    assert alarms <= 3  # of 600


def test_a_form_that_another_beats_beyond_doubt_is_a_misfit() -> None:
    value = BENT * np.exp(np.random.default_rng(5).normal(0, 0.005, 16))
    judged = compare([fitted(value, form) for form in FORMS])
    status = {f.form: f.status for f in judged}
    assert status["power"] == "misfit"
    assert status["power_constant"] == "ok"
    assert status["broken"] == "no_break"
    assert "c + a C^-b describes the same points far better" in judged[0].message
    weights = akaike_weights(judged)
    assert sum(weights.values()) == pytest.approx(1)
    assert max(weights, key=lambda form: weights[form]) == "power_constant"


def test_the_simpler_form_is_kept_where_it_will_do() -> None:
    value = POWER * np.exp(np.random.default_rng(6).normal(0, 0.01, 16))
    judged = {f.form: f for f in compare([fitted(value, form) for form in FORMS])}
    assert judged["power"].status == "ok"
    interval = judged["power_constant"].constant_interval
    assert interval is not None
    assert interval[0] == 0
    aicc = [judged[form].aicc for form in FORMS]
    assert aicc[0] is not None
    assert aicc[0] == min(a for a in aicc if a is not None)


def test_exact_points_leave_no_doubt() -> None:
    judged = {f.form: f for f in compare([fitted(BENT, form) for form in FORMS])}
    assert judged["power"].status == "misfit"
    assert judged["power_constant"].status == "ok"
