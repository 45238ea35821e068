"""The compute-optimal size of a fitted L(N, D), and the command that answers for a budget."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from size_data_points import CHINCHILLA, FLOPS, TRUE, chinchilla, curves

from data_pipeline.errors import DataError, UserError
from evaluation.scaling.commands import size as command
from evaluation.scaling.commands.size_data_text import fit_text
from evaluation.scaling.points import write_csv
from evaluation.scaling.sizes.optimum import Cost, best, budget_flops, fit_cost, optimum
from evaluation.scaling.sizes.size_data import fit_size_data

POINTS = curves(num_seeds=2, between=0.003, within=0.002)


def brute_force(compute: float, cost: Cost) -> tuple[float, float]:
    """(N*, L*) of the true curve on a fine grid of sizes."""
    sizes = np.geomspace(1e5, 1e13, 200_001)
    values = TRUE(sizes, compute / cost.per_image(sizes))
    return float(sizes[values.argmin()]), float(values.min())


@pytest.mark.parametrize(("kappa", "gamma"), [(6.0, 1.0), (900.0, 0.8), (0.01, 1.3)])
@pytest.mark.parametrize("compute", [1e17, 1e21])
def test_the_closed_form_is_the_minimum_along_the_budget(kappa: float, gamma: float, compute: float) -> None:
    cost = Cost(float(np.log(kappa)), gamma, 0.0, "any")
    log_n, log_d, value = best(np.array([dataclasses.astuple(TRUE)]), cost, compute)
    size, least = brute_force(compute, cost)
    assert np.exp(log_n[0]) == pytest.approx(size, rel=1e-3)
    assert value[0] == pytest.approx(least, rel=1e-9)
    assert np.exp(log_d[0]) * cost.per_image(np.exp(log_n[0])) == pytest.approx(compute, rel=1e-9)


def test_optimum_of_an_exact_law() -> None:
    points = curves()
    answer = optimum(fit_size_data(points), points, 1e18)
    size, least = brute_force(1e18, fit_cost(points))
    assert answer.num_params == pytest.approx(size, rel=1e-3)
    assert answer.value == pytest.approx(least, rel=1e-6)
    assert FLOPS * answer.num_params * answer.images == pytest.approx(1e18, rel=1e-6)
    assert answer.num_params_interval is None
    assert answer.warnings == ()
    assert max(answer.compute_factor, answer.size_factor, answer.images_factor) < 1


def test_intervals_hold_the_truth_and_widen_beyond_the_points() -> None:
    fit = fit_size_data(POINTS, num_rounds=300)
    inside, beyond = (optimum(fit, POINTS, compute) for compute in (1e18, 1e23))
    widths = []
    for answer in (inside, beyond):
        size, least = brute_force(answer.compute, fit_cost(POINTS))
        assert answer.num_params_interval is not None
        assert answer.value_interval is not None
        assert answer.num_params_interval[0] <= size <= answer.num_params_interval[1]
        assert answer.value_interval[0] <= least <= answer.value_interval[1]
        widths.append(np.log(answer.num_params_interval[1] / answer.num_params_interval[0]))
    assert widths[1] > widths[0]
    assert [w for w in inside.warnings if "extrapolated" in w] == []
    assert len([w for w in beyond.warnings if "extrapolated" in w]) == 3
    assert beyond.compute_factor == pytest.approx(1e23 / max(p.compute for p in POINTS))


def test_the_best_of_the_sizes_trained() -> None:
    fit = fit_size_data(POINTS, num_rounds=100)
    answer = optimum(fit, POINTS, 1e18)
    sizes = sorted({p.num_params for p in POINTS})
    assert [r.num_params for r in answer.rungs] == sizes
    truth = [float(TRUE(n, 1e18 / (FLOPS * n))) for n in sizes]
    assert answer.best_rung.num_params == sizes[int(np.argmin(truth))]
    shares = [r.share_best for r in answer.rungs]
    assert sum(s for s in shares if s is not None) == pytest.approx(1)
    assert answer.best_rung.value >= answer.value
    assert all(r.interval is not None and r.interval[0] <= r.value <= r.interval[1] for r in answer.rungs)


def test_the_cost_of_an_image_is_a_power_law_with_its_error() -> None:
    cost = fit_cost(chinchilla())
    assert (cost.kappa, cost.gamma) == pytest.approx((6, 1), rel=1e-5)
    assert cost.worst_error < 1e-5
    points = curves(sizes=[1e7, 1e8, 1e9])
    bent = [dataclasses.replace(p, compute=p.compute * (1.5 if p.num_params == 10**8 else 1)) for p in points]
    assert fit_cost(bent).worst_error == pytest.approx(1 - 1.5 ** (-2 / 3), rel=1e-3)
    answer = optimum(fit_size_data(bent), bent, 1e18)
    assert any("no power law" in warning for warning in answer.warnings)
    assert answer.rungs[1].images == pytest.approx(1e18 / (1.5 * FLOPS * 1e8))  # a rung has its own cost


def test_the_chinchilla_optimum() -> None:
    """Besiroglu et al. 2024: about 20 tokens a parameter at Chinchilla's own compute, which was trained with 20."""
    points = chinchilla()
    answer = optimum(fit_size_data(points, loss="lad", num_rounds=200), points, 6 * 70e9 * 1.4e12)
    assert answer.num_params_interval is not None
    assert answer.num_params_interval[0] < 70e9 < answer.num_params_interval[1]
    assert answer.images / answer.num_params == pytest.approx(20, abs=3)
    assert any("extrapolated" in warning for warning in answer.warnings)


def test_what_cannot_be_answered_is_refused() -> None:
    one_size = curves(sizes=[1e7])
    with pytest.raises(DataError, match="one_size"):
        optimum(fit_size_data(one_size), one_size, 1e18)
    with pytest.raises(DataError, match="at least two sizes"):
        fit_cost(one_size)
    with pytest.raises(DataError, match="every point"):
        fit_cost([dataclasses.replace(p, images=0) for p in POINTS])
    fit = fit_size_data(POINTS)
    for compute in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="not a positive number"):
            optimum(fit, POINTS, compute)


def test_a_fit_that_is_not_trusted_is_said_aloud() -> None:
    fit = dataclasses.replace(fit_size_data(POINTS), status="unidentified", message="because")
    assert any("unidentified: because" in warning for warning in optimum(fit, POINTS, 1e18).warnings)


def test_gpu_hours() -> None:
    assert budget_flops(gpu_hours=10, peak_flops=989e12, utilization=0.3) == pytest.approx(1.068e19, rel=1e-3)
    for changed in ({"gpu_hours": -1.0}, {"peak_flops": float("inf")}, {"utilization": 30.0}):
        with pytest.raises(UserError):
            budget_flops(**{"gpu_hours": 10.0, "peak_flops": 1e12, "utilization": 0.3, **changed})


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    arguments = parser.parse_args(["size", *words])
    assert arguments.run(arguments) == 0
    return capsys.readouterr().out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    write_csv(path, POINTS)
    hours = ("--gpu-hours", "1", "--peak-flops", "989e12", "--utilization", "0.3")
    text = run(capsys, str(path), *hours, "--rounds", "50")
    assert "size N*" in text
    assert "by isoFLOP" in text
    assert "alpha" in text
    value = json.loads(run(capsys, str(path), *hours, "--rounds", "50", "--json"))
    assert value["compute"] == pytest.approx(1.068e18, rel=1e-3)
    size, least = brute_force(value["compute"], fit_cost(POINTS))
    assert value["optimum"]["num_params_interval"][0] <= size <= value["optimum"]["num_params_interval"][1]
    assert value["optimum"]["value"] == pytest.approx(least, rel=0.01)
    assert value["isoflop"]["num_params"]["value"] == pytest.approx(size, rel=0.5)
    assert value["fit"]["status"] == "ok"


def test_the_command_on_points_without_a_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    write_csv(path, curves(sizes=[1e7, 1e9]))
    text = run(capsys, str(path), "--compute", "1e18", "--rounds", "50")
    assert "degenerate" in text
    assert "size N*" not in text
    value = json.loads(run(capsys, str(path), "--compute", "1e18", "--rounds", "50", "--json"))
    assert value["optimum"] is None


def test_the_command_says_its_doubts_before_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.csv"
    write_csv(path, curves(between=0.01, within=0.005, sizes=np.geomspace(1e7, 1e9, 5)))
    words = (str(path), "--compute", "1e22", "--rounds", "50")
    text = run(capsys, *words)
    doubts = ("the fit of L(N, D) is unidentified", "runs are too few to tell", "extrapolated: the compute")
    places = [text.index(part) for part in ("budget", *doubts, "size N*", "size trained", "alpha")]
    assert places == sorted(places), text
    assert "runs are too few to tell" not in run(capsys, *words, "--run-spread", "0.01")


@pytest.mark.parametrize("words", [(), ("--compute", "1e18", "--gpu-hours", "1"), ("--gpu-hours", "1")])
def test_the_command_wants_one_budget(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--peak-flops"):
        run(capsys, str(CHINCHILLA), *words)


def test_the_public_command_line() -> None:
    words = ["size", str(CHINCHILLA), "--compute", "1e21", "--rounds", "0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.scaling", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["optimum"]["num_params"] > 1e9


def test_the_text_of_a_fit_has_its_certificate() -> None:
    text = fit_text(fit_size_data(POINTS, num_rounds=50))
    for word in ("status     ok", "E ", "alpha", "N* ~ C^a", "of rounds", "objective", "starts agree", "projected"):
        assert word in text
    assert "one_size" in fit_text(fit_size_data(curves(sizes=[1e7])))
