"""Points, frontier, bootstrap, hold-out, the law and its command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scaling_points import curve_points, point, study

from data_pipeline.errors import DataError
from evaluation.report.tables import law_report
from evaluation.scaling.frontier import find_frontier, slopes_by_run, slopes_by_size
from evaluation.scaling.holdout import hold_out
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.law import Law, fit_law
from evaluation.scaling.points import Point, columns, points_from_records, write_csv
from evaluation.scaling.sources import ColumnNames, read_csv
from trainer.tracking.records import EvalRecord


def power_study(num_runs: int = 10, *, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Runs of different sizes whose points all lie on one power law, up to noise common to a run."""
    rng = np.random.default_rng(seed)
    points = []
    for run in range(num_runs):
        level = np.exp(rng.normal(0, noise))
        for compute in np.geomspace(1e15 * 2**run, 1e17 * 2**run, 4) * rng.uniform(0.8, 1.2):
            value = 9 * (compute / 1e15) ** -0.1 * level
            points.append(point(float(compute), float(value), run=f"run{run}", num_params=10**5 * (run + 1)))
    return points


def test_csv_round_trip_is_exact(tmp_path: Path) -> None:
    points = [*study(), point(1 / 3, 2 / 3, stderr=None, measured='{"T": 4000, "net": "a, b"}')]
    write_csv(tmp_path / "points.csv", points)
    assert read_csv(tmp_path / "points.csv") == points


def test_any_csv_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("flops,fid,err,model\n1e18,30,0.5,a\n2e18,20,,b\n")
    found = read_csv(path, ColumnNames("flops", "fid", "err", "model"))
    assert [(p.compute, p.value, p.stderr, p.run, p.metric) for p in found] == [
        (1e18, 30.0, 0.5, "a", "fid"),
        (2e18, 20.0, None, "b", "fid"),
    ]
    for names, message in (
        (ColumnNames("gflops", "fid"), "no column 'gflops'"),
        (ColumnNames(), "no column 'compute'"),
    ):
        with pytest.raises(DataError, match=message):
            read_csv(path, names)
    path.write_text("compute,value\n1e18,thirty\n")
    with pytest.raises(DataError, match="line 2: value = 'thirty' is not a number"):
        read_csv(path)
    path.write_text("compute,value\n1e18,\n")
    with pytest.raises(DataError, match="line 2: the cell of 'value' is empty"):
        read_csv(path)


def test_points_from_records() -> None:
    record = EvalRecord(
        metric="fd_efflite0", split="test", value=300.0, stderr=None, n=256, seeds=[0], measured={"net": "efflite0"},
        data="d", weights="w", run="r", nimg=2048, compute=1e12, num_params=5, flops_per_image=1e9, seed=3,
    )  # fmt: skip
    found = points_from_records(
        [record, dataclasses.replace(record, split="train")], metric="fd_efflite0", split="test"
    )
    assert len(found) == 1
    assert (found[0].images, found[0].seed, found[0].value) == (2048, 3, 300.0)
    more = dataclasses.replace(record, n=512)
    with pytest.raises(DataError, match=r"different measured .*n = 256 and 512"):
        fit_law(points_from_records([record, more], metric="fd_efflite0", split="test"))


@pytest.mark.parametrize("field", ["metric", "split", "flop_convention", "data"])
def test_unlike_points_are_refused(field: str) -> None:
    points = study()
    points[3] = dataclasses.replace(points[3], **{field: "other"})
    with pytest.raises(DataError, match=f"different {field} cannot share a fit"):
        fit_law(points)


def test_frontier_of_a_hand_made_case() -> None:
    points = [
        point(1, 10, run="a"),
        point(4, 6, run="a"),
        point(16, 5.9, run="a"),
        point(2, 9, run="b"),  # better than a's last point, but a's line passes below
        point(8, 5, run="b"),
        point(32, 4, run="b"),
        point(64, 4, run="b"),  # no better than before
        point(0.5, 20, run="c", images=999),
        point(3, math.nan, run="c"),
        point(0, 3, run="c"),
    ]
    frontier = find_frontier(points)
    assert [(p.run, p.compute) for p in frontier.points] == [("a", 1), ("a", 4), ("b", 8), ("b", 32)]
    reasons = {(e.point.run, e.point.compute): e.reason for e in frontier.exclusions}
    assert reasons["b", 2] == "run a does better there"
    assert reasons["b", 64] == "an earlier point of its own run is as good"
    assert "before the first 1000" in reasons["c", 0.5]
    assert "not finite and positive" in reasons["c", 3]
    assert "not finite and positive" in reasons["c", 0]
    assert len(frontier.points) + len(frontier.exclusions) == len(points)
    assert frontier.decades == pytest.approx(math.log10(32))


def test_frontier_does_not_depend_on_the_order_of_points() -> None:
    points = study(num_seeds=2)
    shuffled = [points[i] for i in np.random.default_rng(0).permutation(len(points))]
    assert find_frontier(points).points == find_frontier(shuffled).points


def test_slopes() -> None:
    runs = [point(x, 5 * level * x**-0.3, run=str(level)) for level in (1, 2) for x in (1.0, 2.0, 8.0)]
    for slope in (*slopes_by_run(runs), *slopes_by_size(runs)):
        assert slope.slope == pytest.approx(-0.3)
        assert slope.stderr == pytest.approx(0, abs=1e-9)
    assert slopes_by_size(runs)[0].num_runs == 2
    single = slopes_by_run([point(1, 5)])[0]
    assert single.slope is None
    assert single.stderr is None


def test_single_seeds_are_not_trusted() -> None:
    law = fit_law(study(), settings=Settings(num_rounds=100))
    for law_fit in law.fits[:2]:
        assert law_fit.uncertainty is not None
        assert law_fit.uncertainty.status == "uncalibrated"
        assert law_fit.uncertainty.intervals["exponent"]
    assert law.of("power_constant").fit.status == "ok"
    assert law.of("power_constant").status == "uncalibrated"
    assert any("Train several seeds a size" in note for note in law.notes)


def test_seeds_are_one_curve() -> None:
    """The frontier is that of the mean, not of the luckiest seed."""
    points = [
        point(compute, value, run=f"{size}-{seed}", num_params=size, seed=seed)
        for size, level in ((1, 5.0), (2, 6.0))
        for seed, luck in ((0, -0.4), (1, 0.4))
        for compute in (1.0, 2.0, 4.0)
        for value in [level + luck - 0.1 * compute]
    ]
    frontier = find_frontier(points)
    assert [(p.compute, p.value) for p in frontier.points] == [(x, pytest.approx(5 - 0.1 * x)) for x in (1.0, 2.0, 4.0)]
    assert len(frontier.admitted) == 12
    assert len(frontier.candidates) == 6
    assert len(columns(frontier.candidates).runs) == 2
    reasons = {e.reason for e in frontier.exclusions}
    assert reasons == {"run mean of 2 seeds, 1 parameters does better there"}
    alike = [dataclasses.replace(p, seed=0) for p in points]  # runs that differ in something else are not averaged
    assert find_frontier(alike).points == find_frontier([p for p in alike if p.run == "1-0"]).points


def test_hold_out_uses_nothing_above_the_cut() -> None:
    points = power_study(noise=0.01)
    frontier = find_frontier(points)
    found = hold_out(frontier, "power")
    cut_logs = np.log([frontier.points[0].compute, found.cut_compute, frontier.points[-1].compute])
    assert cut_logs[1] - cut_logs[0] == pytest.approx(2 / 3 * (cut_logs[2] - cut_logs[0]))
    changed = [dataclasses.replace(p, value=p.value * 0.99) if p.compute > found.cut_compute else p for p in points]
    other = hold_out(find_frontier(changed), "power")
    first = {h.point.compute: h.predicted for h in found.points}
    second = {h.point.compute: h.predicted for h in other.points}
    common = first.keys() & second.keys()
    assert common
    assert all(first[c] == second[c] for c in common)


def test_hold_out_error_of_an_exact_law_is_zero_and_no_change_is_not() -> None:
    found = hold_out(find_frontier(power_study()), "power")
    assert found.mean_relative_error == pytest.approx(0, abs=1e-9)
    assert found.no_change_error is not None
    assert found.no_change_error > 0.05


def test_law_of_an_exact_power_law_says_that_it_holds() -> None:
    law = fit_law(power_study(noise=1e-4), settings=Settings(num_rounds=100))
    assert law.verdict.startswith("A pure power law holds over this range")
    assert len(law.frontier.sizes) > 4


def test_law_of_a_bent_frontier_says_so() -> None:
    compute = np.geomspace(1e15, 1e19, 12)
    law = fit_law(curve_points(compute, 3 + 4 * (compute / 1e15) ** -0.4), settings=Settings(num_rounds=100))
    assert law.of("power_constant").fit.status == "ok"
    assert any(note.startswith("The frontier bends: c = 3") for note in law.notes)
    assert not law.verdict.startswith("A pure power law holds over")


def test_one_size_is_a_learning_curve() -> None:
    points = [p for p in study() if p.num_params == 420_000]
    law = fit_law(points, settings=Settings(num_rounds=50))
    assert not law.has_fit
    assert {law.of(form).fit.status for form in ("power", "power_constant")} == {"one_size"}
    assert law.of("power").hold_out.mean_relative_error is None
    assert law.size_slopes[0].slope is not None


@pytest.mark.parametrize(
    "points",
    [
        [],
        study()[:1],
        [point(1e15, 5.0), point(2e15, 4.0)],
        curve_points(np.geomspace(1, 1e3, 6), np.full(6, 2.0)),
        curve_points(np.geomspace(1, 1e3, 6), np.full(6, np.nan)),
        curve_points(np.zeros(6), np.arange(1, 7)),
        curve_points(np.geomspace(1, 1e3, 6), np.arange(1, 7)),
    ],
    ids=["none", "one", "two", "constant", "nan", "zero compute", "rising"],
)
def test_degenerate_studies_give_no_law(points: list[Point]) -> None:
    law = fit_law(points, settings=Settings(num_rounds=20))
    assert not law.has_fit
    assert law.verdict.startswith("No law is fitted")
    json.dumps(law.to_json(), allow_nan=False)
    assert "No law is fitted" in law_report(law)


def test_law_json_and_report() -> None:
    law: Law = fit_law(study(), settings=Settings(num_rounds=100))
    value = json.loads(json.dumps(law.to_json(), allow_nan=False))
    assert value["fits"][0]["fit"]["curve"]["exponent"] == law.of("power").fit.curve.exponent  # type: ignore[union-attr]
    report = law_report(law)
    assert law.verdict in report
    for p in law.frontier.candidates:
        assert p.run in report
    assert max(len(line) for line in report.splitlines() if line.startswith("  *")) < 140
