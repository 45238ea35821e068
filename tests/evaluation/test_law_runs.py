"""Fits as runs of a tracker: the same short names for every fit, and an id made from all that a run says."""

from __future__ import annotations

import dataclasses
import math

import pytest
from scaling_points import SIZES, curve_points, point

from evaluation.report.law_runs import CURVE_POINTS, law_runs
from evaluation.scaling.law import Law, fit_law
from evaluation.scaling.sizes.size_data import fit_size_data


@pytest.fixture(scope="module")
def law() -> Law:
    """A frontier with a constant, without noise."""
    compute = [1e12 * 2**n for n in range(9)]
    return fit_law(curve_points(compute, [3.0 + 2.0 * (c / 1e12) ** -0.3 for c in compute]))


def test_a_run_a_fit_and_one_for_the_report(law: Law) -> None:
    *fits, report = law_runs([law], study="s")
    assert [run.tags["form"] for run in fits] == [law_fit.fit.form for law_fit in law.fits]
    assert fits[1].name == "law nll/test: c + a C^-b"
    assert {run.tags["kind"] for run in fits} == {"law"}
    assert [run.params["status"] for run in fits] == [law_fit.status for law_fit in law.fits]
    assert (report.id, report.tags["kind"], report.carries_files) == ("s-report", "report", True)


def test_numbers_have_the_same_short_names_for_every_fit(law: Law) -> None:
    fits = law_runs([law], study="s")
    constant = next(run for run in fits if run.tags.get("form") == "power_constant")
    assert constant.metrics["exponent"] == pytest.approx(0.3, rel=1e-6)
    assert constant.metrics["constant"] == pytest.approx(3.0, rel=1e-6)
    fit = law.of("power_constant").fit
    assert fit.constant_interval is not None
    low, high = constant.metrics["constant_profile_low"], constant.metrics["constant_profile_high"]
    assert (low, high) == fit.constant_interval
    for run in fits[:2]:
        assert {"exponent", "constant", "r2_log", "held_out_error", "num_points", "objective", "condition_number",
                "share_of_starts"} <= run.metrics.keys()  # fmt: skip
        assert all(math.isfinite(value) for value in run.metrics.values())
        assert run.documents["fit.json"]["fit"]["form"] == run.tags["form"]


def test_only_a_fit_that_may_be_drawn_has_a_curve_under_the_trials_name(law: Law) -> None:
    for run, law_fit in zip(law_runs([law], study="s"), law.fits, strict=False):
        assert (run.tags["drawn"] == "yes") == (law_fit.fit.status == "ok") == bool(run.curves)
        for name, curve in run.curves.items():
            assert name == "nll/test"
            assert len(curve) == CURVE_POINTS
            assert curve[0][0] == pytest.approx(1e12)
            assert curve[-1][0] == pytest.approx(3 * 1e12 * 2**8)
            assert law_fit.fit.curve is not None
            assert curve[7][1] == pytest.approx(float(law_fit.fit.curve(curve[7][0])))
    assert any(run.tags["best"] == "yes" for run in law_runs([law], study="s")[:-1])


def test_the_same_fit_has_the_same_id_and_any_other_another(law: Law) -> None:
    ids = [run.id for run in law_runs([law], study="s")]
    assert len(set(ids)) == len(ids)
    assert [run.id for run in law_runs([law], study="s")] == ids
    assert law_runs([law], study="other")[0].id != ids[0]
    fits = tuple(dataclasses.replace(f, hold_out=dataclasses.replace(f.hold_out, message="x")) for f in law.fits)
    assert law_runs([dataclasses.replace(law, fits=fits)], study="s")[0].id != ids[0]


def test_the_law_in_size_and_data_is_a_row_without_a_curve(law: Law) -> None:
    points = [
        point(n * d * 6.0, 2.0 + 400 * n**-0.35 + 300 * d**-0.3, num_params=n, images=int(d), run=f"{n}")
        for n, _ in SIZES for d in (1e4, 4e4, 1.6e5, 6.4e5)
    ]  # fmt: skip
    fit = fit_size_data(points, num_rounds=20)
    run = law_runs([law], study="s", size_data={"nll/test": fit})[-2]
    assert run.name == "law nll/test: E + A N^-α + B D^-β"
    assert fit.curve is not None
    assert run.metrics["alpha"] == fit.curve.alpha == pytest.approx(0.35, abs=1e-3)
    assert run.metrics["constant"] == fit.curve.E
    assert not {"E", "E_low"} & run.metrics.keys()
    assert (run.curves, run.tags["drawn"], run.params["status"]) == ({}, "no", fit.status)
