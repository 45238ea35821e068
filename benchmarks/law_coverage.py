"""How often do a law's 95 % intervals hold the truth? Studies simulated with a real study's design, fitted end to end.

    python -m benchmarks.law_coverage [--points POINTS.csv] [--studies 400] [--scales 1,1.5,3] [--json FILE]

The design is that of the points given: sizes, computes and learning curves, smoothed along each size. New runs scatter
about those curves with the spread that the study itself shows, between seeds and along a run. Each simulated study goes
the whole way: seeds averaged, frontier selected, laws fitted, intervals made. The truth is what the same way gives for
the smooth curves, as if every size had been trained infinitely often. `interval_ok` is the share of intervals that
their law does not itself call uncalibrated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.files import write_json
from evaluation.scaling.fitting.fits import fit
from evaluation.scaling.fitting.forms import Form, parameters
from evaluation.scaling.frontier import admit, find_frontier
from evaluation.scaling.intervals.bootstrap import Settings, frontier_uncertainty
from evaluation.scaling.intervals.rounds import Question
from evaluation.scaling.intervals.spread import Smoother, spread_of_curves
from evaluation.scaling.points import Point, columns
from evaluation.scaling.seeds import average_seeds
from evaluation.scaling.sources import Selection, read_points

FORMS: tuple[Form, ...] = ("power", "power_constant")
NAMES = {"power": ("exponent", "amplitude"), "power_constant": ("exponent", "constant", "amplitude")}
DESIGN = Path(__file__).parent / "data" / "cifar10_cpu_3seeds.csv"


@dataclass(frozen=True)
class Design:
    """The smooth curves of a study: one point a size and compute."""

    points: tuple[Point, ...]
    between: float  # standard deviation of log value between seeds, that of the scatter along a run taken out
    within: float  # along a run


@dataclass(frozen=True)
class Row:
    """What one simulated study said of one parameter."""

    form: Form
    parameter: str
    status: str  # of the fit
    interval_status: str
    covered: bool
    above: bool  # the interval lies above the truth
    relative_width: float


def design_of(points: Sequence[Point]) -> Design:
    """Smooth curves and spread of a study with several seeds a size."""
    admitted, _ = admit(points)
    curves = average_seeds(admitted)
    c = columns(curves)
    log_values = Smoother(c)(np.log(c.value)[None])[0]
    smooth = [dataclasses.replace(p, value=float(np.exp(v))) for p, v in zip(curves, log_values, strict=True)]
    spread = spread_of_curves(admitted)
    per_run = len(curves) / len({p.run for p in curves})
    between = max(0.0, spread.between**2 - spread.within**2 / per_run) ** 0.5
    return Design(tuple(smooth), between, spread.within)


def simulate(design: Design, num_seeds: int, rng: np.random.Generator) -> list[Point]:
    """A study: every size trained with `num_seeds` seeds."""
    found = []
    for curve in dict.fromkeys(p.run for p in design.points):  # not a set, whose order no seed decides
        own = [p for p in design.points if p.run == curve]
        for seed in range(num_seeds):
            level = rng.normal(0, design.between)
            for point in own:
                value = point.value * float(np.exp(level + rng.normal(0, design.within)))
                found.append(dataclasses.replace(point, value=value, run=f"{curve}, seed {seed}", seed=seed))
    return found


def outcome(
    points: Sequence[Point], form: Form, settings: Settings
) -> tuple[dict[str, float], str, dict[str, tuple[float, float]], str]:
    """The parameters, status, intervals and their status of one form on the frontier of the points."""
    frontier = find_frontier(points, min_images=0)
    fitted = fit(columns(frontier.points), form)
    if fitted.curve is None:
        return {}, fitted.status, {}, "failed"
    last = frontier.points[-1].compute
    question = Question(form, 0.0, fitted.curve.reference_compute, last, np.array([last]))
    uncertainty = frontier_uncertainty(frontier, fitted, question, settings)
    intervals = dict(uncertainty.intervals)
    for prediction in uncertainty.predictions:
        assert prediction.low is not None
        assert prediction.high is not None
        intervals[f"prediction x{prediction.factor:g}"] = (prediction.low, prediction.high)
    if fitted.constant_interval is not None:
        intervals["constant, profile of independent points"] = fitted.constant_interval
    return parameters(fitted.curve), fitted.status, intervals, uncertainty.status


def truth_of(design: Design, form: Form, reference: float, targets: dict[str, float]) -> dict[str, float]:
    """What the smooth curves give; the amplitude at the reference compute."""
    curve = fit(columns(find_frontier(design.points, min_images=0).points), form).curve
    assert curve is not None
    values = parameters(curve)
    values["amplitude"] = float(curve(reference)) - curve.constant
    values["constant, profile of independent points"] = curve.constant
    return values | {name: float(curve(compute)) for name, compute in targets.items()}


def study_rows(design: Design, num_seeds: int, number: int, settings: Settings) -> list[Row]:
    """One simulated study."""
    rng = np.random.default_rng([number, num_seeds])
    points = simulate(design, num_seeds, rng)
    last = max(p.compute for p in find_frontier(points, min_images=0).points)
    rows = []
    for form in FORMS:
        values, status, intervals, interval_status = outcome(points, form, dataclasses.replace(settings, seed=number))
        if not values:
            rows += [Row(form, name, status, interval_status, False, False, np.nan) for name in NAMES[form]]
            continue
        targets = {"prediction x10": 10 * last, "prediction x100": 100 * last}
        truth = truth_of(design, form, values["reference_compute"], targets)
        for name, (low, high) in intervals.items():
            covered = low <= truth[name] <= high
            rows.append(
                Row(
                    form,
                    name,
                    status,
                    interval_status,
                    covered,
                    truth[name] < low,
                    (high - low) / abs(truth[name] or 1),
                )
            )
    return rows


def coverage(
    design: Design, num_seeds: int, num_studies: int, settings: Settings, workers: int
) -> list[dict[str, object]]:
    """One line a form and parameter."""
    tasks = [(design, num_seeds, number, settings) for number in range(num_studies)]
    if workers == 1:
        rows = [row for task in tasks for row in study_rows(*task)]
    else:
        with ProcessPoolExecutor(workers) as pool:
            rows = [row for found in pool.map(study_rows, *zip(*tasks, strict=True), chunksize=8) for row in found]
    lines: list[dict[str, object]] = []
    for form, name in dict.fromkeys((r.form, r.parameter) for r in rows):
        own = [r for r in rows if (r.form, r.parameter) == (form, name)]
        sure = [r for r in own if r.interval_status == "ok"]
        lines.append({
            "form": form, "parameter": name, "seeds": num_seeds, "studies": len(own),
            "covered": float(np.mean([r.covered for r in own])),
            "interval_ok": len(sure) / len(own),
            "covered_where_ok": float(np.mean([r.covered for r in sure])) if sure else None,
            "too_high": float(np.mean([r.above for r in own])),
            "fit_ok": float(np.mean([r.status == "ok" for r in own])),
            "median_relative_width": float(np.nanmedian([r.relative_width for r in own])),
        })  # fmt: skip
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=Path, default=DESIGN, help="points of a study with several seeds a size")
    parser.add_argument("--metric", default="nll")
    parser.add_argument("--split", default="test")
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=500, help="of each study's intervals")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scales", default="1,1.5,3", metavar="F,…", help="multiples of the study's own spread")
    a = parser.parse_args()
    study = design_of(read_points(str(a.points), selection=Selection(a.metric, a.split)))
    lines = []
    for scale in (float(word) for word in a.scales.split(",")):
        design = dataclasses.replace(study, between=scale * study.between, within=scale * study.within)
        print(f"spread between seeds {design.between:.2%}, along a run {design.within:.2%} (standard deviations)")
        for num_seeds in (1, 2, 3, 5):
            for line in coverage(design, num_seeds, a.studies, Settings(num_rounds=a.rounds), os.cpu_count() or 1):
                lines.append({"between": design.between, "within": design.within} | line)
                print(json.dumps(line), flush=True)
    if a.json:
        write_json(a.json, {"design": a.points.name, "rows": lines})


if __name__ == "__main__":
    main()
