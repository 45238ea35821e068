"""Points of a known L(N, D), for the tests of the law in size and data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scaling_points import point

from evaluation.scaling.points import Point
from evaluation.scaling.sizes.size_data_curve import SizeDataCurve
from evaluation.scaling.sources import read_csv

TRUE = SizeDataCurve(E=1.8, log_A=float(np.log(400)), alpha=0.34, log_B=float(np.log(2000)), beta=0.37)
FLOPS = 6.0  # of one image, for each parameter
# Losses read off figure 4 of Hoffmann et al. 2022 by Epoch AI (github.com/epoch-research/analyzing-chinchilla,
# data/svg_extracted_data.csv, with D = C / 6N), the table of Besiroglu et al. 2024, "Chinchilla Scaling: A replication
# attempt".
CHINCHILLA = Path(__file__).parent / "tables" / "chinchilla_figure4.csv"


def chinchilla() -> list[Point]:
    """The 240 points of Besiroglu et al.: without the five highest losses, which they take for outliers."""
    points = read_csv(CHINCHILLA)
    fifth = sorted(p.value for p in points)[-5]
    return [p for p in points if p.value < fifth]


def curves(
    curve: SizeDataCurve = TRUE,
    *,
    sizes: object = tuple(np.geomspace(1e7, 1e9, 6)),
    images: object = tuple(np.geomspace(1e8, 3e10, 8)),
    num_seeds: int = 1,
    between: float = 0.0,
    within: float = 0.0,
    seed: int = 0,
) -> list[Point]:
    """Learning curves of every size and seed; scatter of log value between runs and along them."""
    rng = np.random.default_rng(seed)
    points = []
    for n in np.asarray(sizes, dtype=float).astype(int).tolist():
        for run in range(num_seeds):
            level = rng.normal(0, between) if between else 0.0
            for d in np.asarray(images, dtype=float).astype(int).tolist():
                noise = rng.normal(0, within) if within else 0.0
                value = float(curve(n, d) * np.exp(level + noise))
                points.append(point(FLOPS * n * d, value, num_params=n, images=d, run=f"size{n}-seed{run}", seed=run))
    return points
