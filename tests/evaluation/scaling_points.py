"""Synthetic points for the tests of scaling laws."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from evaluation.scaling.points import Point
from trainer.tracking.records import FLOP_CONVENTION

SIZES = ((420_000, 4.76e8), (940_000, 1.0e9), (1_680_000, 1.73e9), (3_700_000, 3.7e9))  # parameters, FLOPs an image


def point(compute: float, value: float, **changes: object) -> Point:
    fields: dict[str, object] = {
        "metric": "nll", "split": "test", "value": value, "stderr": None, "compute": compute,
        "flop_convention": FLOP_CONVENTION, "num_params": 1_000_000, "images": 5000, "run": "run", "seed": 0,
        "data": "fingerprint", "measured": "",
    }  # fmt: skip
    return Point(**{**fields, **changes})  # type: ignore[arg-type]


def curve_points(compute: ArrayLike, value: ArrayLike, **changes: object) -> list[Point]:
    """One run of its own size for each point."""
    pairs = zip(np.asarray(compute, float), np.asarray(value, float), strict=True)
    return [point(x, y, **{"run": f"run{i}", "num_params": i + 1, **changes}) for i, (x, y) in enumerate(pairs)]


def study(*, num_seeds: int = 1, spread: float = 0.005, stderr: float = 0.03, seed: int = 0) -> list[Point]:
    """Learning curves of four sizes to equal compute; the first point of each is before 1,000 images."""
    rng = np.random.default_rng(seed)
    points = []
    for size, flops in SIZES:
        for run in range(num_seeds):
            level = np.exp(rng.normal(0, spread))
            for images in np.geomspace(600, 1.2e13 / flops, 7):
                scale = size / 1e6
                value = 3.0 + 0.6 * scale**-0.35 + 2.4 * (images / 1000) ** -0.6 * scale**-0.1
                points.append(
                    point(
                        images * flops, float(value * level + rng.normal(0, 0.7 * stderr)), stderr=stderr,
                        num_params=size, images=int(images), run=f"size{size}-seed{run}", seed=run,
                    )
                )  # fmt: skip
    return points
