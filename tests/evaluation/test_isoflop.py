"""IsoFLOP: parabolas at equal compute, from designs of equal computes and from learning curves."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scaling_points import point
from size_data_points import CHINCHILLA, FLOPS, TRUE, chinchilla, curves

from evaluation.scaling.commands import isoflop as command
from evaluation.scaling.points import Point, write_csv
from evaluation.scaling.sizes.isoflop import isoflop
from evaluation.scaling.sizes.isoflop_slices import find_slices
from evaluation.scaling.sizes.size_data_curve import SizeDataCurve

EXPONENT = TRUE.size_exponent


def best_size(compute: float, curve: SizeDataCurve = TRUE) -> float:
    """Where L(N, C / 6N) has its minimum, by brute force."""
    sizes = np.geomspace(1e5, 1e12, 40_001)
    return float(sizes[np.argmin(curve(sizes, compute / (FLOPS * sizes)))])


def design(
    *, noise: float = 0.0, jitter: float = 0.0, seed: int = 0, budgets: object = (1e18, 1e19, 1e20, 1e21)
) -> list[Point]:
    """Hoffmann et al.'s: at every budget nine sizes around the best, each trained for just that budget."""
    rng = np.random.default_rng(seed)
    points = []
    for budget in np.asarray(budgets, dtype=float):
        for n in (best_size(budget) * np.geomspace(0.5, 2, 9)).astype(int).tolist():
            compute = float(budget * np.exp(rng.normal(0, jitter)))
            value = float(TRUE(n, compute / (FLOPS * n)) * np.exp(rng.normal(0, noise)))
            points.append(
                point(compute, value, num_params=n, images=round(compute / (FLOPS * n)), run=f"{budget:g}-{n}")
            )
    return points


def test_a_parabola_is_recovered_exactly() -> None:
    points = []
    for budget, size in ((1e18, 1e8), (1e19, 3e8), (1e20, 9e8)):
        for n in (int(size * f) for f in (0.3, 0.7, 1.5, 4.0)):
            value = 2.5 + 0.05 * np.log(n / size) ** 2
            points.append(point(budget, float(value), num_params=n, images=int(budget / 6 / n), run=f"{budget}{n}"))
    result = isoflop(points, num_rounds=0)
    assert result.status == "ok"
    assert [s.optimal_size for s in result.slices] == pytest.approx([1e8, 3e8, 9e8], rel=1e-6)
    assert [s.optimal_value for s in result.slices] == pytest.approx([2.5] * 3, rel=1e-8)
    assert [s.curvature for s in result.slices] == pytest.approx([0.1] * 3, rel=1e-6)
    assert [s.optimal_images for s in result.slices] == pytest.approx([1e18 / 6e8, 1e19 / 18e8, 1e20 / 54e8], rel=1e-6)
    assert result.slices[0].parabola([1e8, 2e8]) == pytest.approx([2.5, 2.5 + 0.05 * np.log(2) ** 2])
    assert result.size_law is not None
    assert result.images_law is not None
    assert result.size_law.exponent == pytest.approx(np.log10(3), rel=1e-6)
    assert result.images_law.exponent == pytest.approx(1 - np.log10(3), rel=1e-6)
    assert result.size_law(1e19) == pytest.approx(3e8, rel=1e-6)
    assert result.size_law.interval(1e19) is None


def test_a_design_of_equal_computes_is_found_and_covers_the_best_size() -> None:
    """Of 160 intervals of 40 simulated designs, 95 % hold the truth, give or take a binomial's scatter."""
    truth = {budget: best_size(budget) for budget in (1e18, 1e19, 1e20, 1e21)}
    covered, exponents = 0, 0
    for seed in range(40):
        result = isoflop(design(noise=0.001, jitter=0.004, seed=seed), num_rounds=100, seed=seed)
        assert [s.status for s in result.slices] == ["ok"] * 4
        for s, (budget, size) in zip(result.slices, truth.items(), strict=True):
            assert s.budget == pytest.approx(budget, rel=0.01)
            assert not s.interpolated
            assert s.size_interval is not None
            covered += s.size_interval[0] <= size <= s.size_interval[1]
        assert result.size_law is not None
        assert result.size_law.exponent_interval is not None
        low, high = result.size_law.exponent_interval
        exponents += low <= EXPONENT <= high
    assert 142 <= covered <= 159, covered
    assert exponents >= 33, exponents


def test_learning_curves_are_interpolated_at_the_budgets_and_never_beyond() -> None:
    points = curves(sizes=np.geomspace(1e7, 1e9, 9), images=np.geomspace(1e8, 1e11, 30))
    budget = 3e18
    (s,) = isoflop(points, budgets=[budget], num_rounds=0).slices
    assert s.interpolated
    assert np.array(s.sizes) * np.array(s.images) * FLOPS == pytest.approx(budget, rel=1e-3)
    assert np.array(s.values) == pytest.approx(TRUE(s.sizes, s.images), rel=1e-3)
    largest = {n: max(p.compute for p in points if p.num_params == n) for n in {p.num_params for p in points}}
    (beyond,) = find_slices(points, [2 * min(largest.values())], 1)
    assert beyond.num_sizes == sum(1 for c in largest.values() if c >= 2 * min(largest.values()))


def test_learning_curves_recover_the_law_within_its_interval() -> None:
    """Of 30 studies of 20 learning curves, 95 % of the intervals hold the truth, give or take a binomial's scatter."""
    covered, widths = np.zeros(2), []
    for seed in range(30):
        points = curves(
            sizes=np.geomspace(3e7, 6e8, 10), images=np.geomspace(3e8, 3e11, 20), num_seeds=2, between=0.004,
            within=0.002, seed=seed,
        )  # fmt: skip
        result = isoflop(points, budgets=np.geomspace(2e18, 3e19, 6), num_rounds=200, seed=seed)
        assert result.status == "ok"
        assert result.num_runs == 20
        assert result.size_law is not None
        assert result.images_law is not None
        assert result.size_law.exponent_interval is not None
        low, high = result.size_law.exponent_interval
        ends = result.size_law.interval(1e19)
        assert ends is not None
        covered += [low <= EXPONENT <= high, ends[0] <= best_size(1e19) <= ends[1]]
        widths.append(high - low)
        product = FLOPS * result.size_law(1e19) * result.images_law(1e19)
        assert product == pytest.approx(1e19, rel=1e-3)
    assert np.all(covered >= 25), covered
    assert np.median(widths) < 0.25


@pytest.mark.parametrize("num_sizes", [12, 24])
def test_sizes_far_from_the_minimum_do_not_shift_it(num_sizes: int) -> None:
    """The loss at equal compute is no parabola over two decades of sizes: one through all is off by up to 10 %."""
    points = curves(sizes=np.geomspace(1e7, 1e9, num_sizes), images=np.geomspace(1e8, 1e12, 40))
    for s in isoflop(points, budgets=np.geomspace(3e17, 3e19, 7), num_rounds=0).slices:
        assert s.optimal_size == pytest.approx(best_size(s.budget), rel=0.02)
        assert s.num_fitted_sizes < len(s.sizes)


def test_default_budgets_lie_where_four_sizes_overlap() -> None:
    points = curves(sizes=np.geomspace(1e7, 1e9, 6), images=np.geomspace(1e8, 1e11, 20))
    slices = find_slices(points, None, 5)
    assert len(slices) == 5
    assert all(s.num_sizes >= 4 for s in slices)
    ratios = np.diff(np.log([s.budget for s in slices]))
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-6)


def test_few_runs_are_said_to_be_few() -> None:
    points = curves(sizes=np.geomspace(1e7, 1e9, 6), images=np.geomspace(1e8, 1e11, 20), between=0.002)
    result = isoflop(points, num_rounds=200)
    assert "few" in result.interval_message


def test_the_chinchilla_points_of_one_size_are_one_curve() -> None:
    """Hoffmann et al. 2022, table 2, approach 2: N* ~ C^0.49 (80 % interval 0.462 to 0.534) on their own isoFLOPs."""
    result = isoflop(chinchilla(), num_rounds=200)
    assert result.size_law is not None
    assert result.size_law.exponent == pytest.approx(0.49, abs=0.03)
    assert result.size_law.exponent_interval is not None
    assert result.size_law.exponent_interval[0] < 0.49 < result.size_law.exponent_interval[1]


def by_size(values: list[float], sizes: tuple[float, ...] = (1e7, 3e7, 1e8, 3e8, 1e9)) -> list[Point]:
    pairs = zip(sizes, values, strict=True)
    return [point(1e18, y, num_params=int(n), images=int(1e17 / n), run=str(n)) for n, y in pairs]


@pytest.mark.parametrize(
    ("points", "status", "word"),
    [
        (by_size([3.0, 2.9], (1e7, 1e8)), "too_few_sizes", "2 sizes"),
        (by_size([3.4, 3.2, 3.05, 2.95, 2.9]), "edge", "largest"),
        (by_size([2.9, 2.95, 3.05, 3.2, 3.4]), "edge", "smallest"),
        (by_size([2.9, 3.0, 3.05, 3.0, 2.9]), "not_convex", "no minimum"),
        (by_size([3.0, 2.9, 3.1, 2.9, 3.05]), "unidentified", "curvature"),
        (by_size([3.1, 2.95, 2.9, 2.94, 3.1]), "ok", ""),
    ],
)
def test_a_slice_says_what_is_wrong_with_it(points: list[Point], status: str, word: str) -> None:
    (s,) = isoflop(points, budgets=[1e18], num_rounds=0).slices
    assert s.status == status
    assert word in s.message
    if status in ("too_few_sizes", "edge", "not_convex"):
        assert s.optimal_size is None
    if status != "ok":
        assert s.size_interval is None


@pytest.mark.parametrize(
    ("points", "status"),
    [
        ([], "invalid"),
        ([dataclasses.replace(p, num_params=0) for p in design()], "invalid"),
        ([dataclasses.replace(p, value=float("nan")) for p in design()], "invalid"),
        (curves(sizes=[1e7, 1e9]), "no_slices"),
        (design(budgets=(1e18, 1e19)), "too_few_minima"),
        (design(budgets=(1e18, 1.3e18, 1.6e18)), "too_few_minima"),
    ],
)
def test_points_without_a_law_get_a_status_and_no_law(points: list[Point], status: str) -> None:
    result = isoflop(points, num_rounds=20)
    assert result.status == status
    assert result.message
    assert result.size_law is None
    assert result.images_law is None


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return parser.parse_args(["isoflop", *words])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "points.csv")
    write_csv(Path(path), design(noise=0.0005))
    found = arguments(path, "--rounds", "50")
    assert found.run(found) == 0
    text = capsys.readouterr().out
    assert "N* = " in text
    assert text.count(" ok\n") == 4
    found = arguments(path, "--rounds", "50", "--json")
    assert found.run(found) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["status"] == "ok"
    assert value["size_law"]["exponent"] == pytest.approx(EXPONENT, abs=0.05)
    assert len(value["slices"]) == 4
    assert "samples" not in value["size_law"]


def test_the_command_takes_budgets_and_refuses_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    found = arguments(str(CHINCHILLA), "--budgets", "1e19,1e20", "--rounds", "0")
    assert found.run(found) == 0
    assert "too_few_minima" in capsys.readouterr().out
    bad = arguments(str(CHINCHILLA), "--budgets", "much")
    with pytest.raises(command.UserError, match="1e18,3e18"):
        bad.run(bad)
