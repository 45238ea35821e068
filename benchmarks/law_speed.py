"""How long does a fit of many points with its bootstrap take, form by form?

    python -m benchmarks.law_speed [--points 10000] [--rounds 1000] [--json FILE]

Generated points with 1 % scatter, every one a run of its own (200 runs for L(N, D)), in two threads. CPU seconds are
what counts on a shared machine. The goal: 10,000 points and 1,000 rounds in less than 60 seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.files import write_json
from evaluation.scaling.fitting.forms import Form
from evaluation.scaling.frontier import all_points
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.one_fit import fit_one
from evaluation.scaling.points import Array, Point
from evaluation.scaling.sizes.size_data import fit_size_data

TRUTHS: dict[Form, Callable[[Array], Array]] = {
    "power": lambda x: 3 * x**-0.15,
    "power_constant": lambda x: 2 + 3 * x**-0.3,
    "broken": lambda x: 1 + 3 * x**-0.05 * (1 + (x / 100) ** 2) ** -0.15,
}


def make_points(compute: Array, value: Array, num_params: Array, images: Array, num_runs: int) -> list[Point]:
    """Points of `num_runs` runs."""
    rows = zip(compute.tolist(), value.tolist(), num_params.tolist(), images.tolist(), strict=True)
    return [
        Point("loss", "", y, None, x, "generated", int(n), int(d), f"run {i % num_runs}", 0)
        for i, (x, y, n, d) in enumerate(rows)
    ]


def law_points(form: Form, num: int) -> list[Point]:
    """Points about one form of compute."""
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(0, 5, num)
    nothing = np.zeros(num)
    return make_points(x * 1e16, TRUTHS[form](x) * np.exp(rng.normal(0, 0.01, num)), nothing, nothing, num)


def size_points(num: int) -> list[Point]:
    """Points about L(N, D)."""
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7, 10, num), 10 ** rng.uniform(8, 11, num)
    value = (1.8 + 480 * n**-0.35 + 2000 * d**-0.37) * np.exp(rng.normal(0, 0.01, num))
    return make_points(6 * n * d, value, n, d, 200)


def timed(name: str, work: Callable[[], str]) -> dict[str, object]:
    """The row of one fit."""
    wall, cpu = time.perf_counter(), time.process_time()
    status = work()
    return {
        "form": name, "status": status, "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    settings = Settings(num_rounds=a.rounds)
    rows = []
    for form in TRUTHS:
        frontier = all_points(law_points(form, a.points))
        rows.append(timed(form, lambda: fit_one(frontier, form, select=False, settings=settings).status))  # noqa: B023
        print(json.dumps(rows[-1]), flush=True)
    points = size_points(a.points)
    rows.append(timed("size_data", lambda: fit_size_data(points, num_rounds=a.rounds).status))
    print(json.dumps(rows[-1]))
    if a.json:
        write_json(a.json, {"points": a.points, "rounds": a.rounds, "rows": rows})


if __name__ == "__main__":
    main()
