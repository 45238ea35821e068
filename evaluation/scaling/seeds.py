"""Runs that differ in nothing but their seed are one curve, their mean: else the frontier were the luckiest seed's.

The least of several noisy values lies below what a size can be expected to reach, the more so the more seeds there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from evaluation.scaling.points import Array, Point


def average_seeds(points: Sequence[Point]) -> list[Point]:
    """One point for every curve and compute: the mean over its seeds, with the standard error of that mean.

    Points of unknown size, or of runs whose seeds do not differ, stay as they are.
    """
    names = mean_names(points)
    groups: dict[tuple[str, float], list[Point]] = {}
    for point in points:
        groups.setdefault((names[point.run], point.compute), []).append(point)
    return [_mean(name, group) for (name, _), group in groups.items()]


def averaging(points: Sequence[Point], means: Sequence[Point]) -> Array:
    """The matrix [len(means), len(points)] that averages over seeds: rows add up to 1."""
    names = mean_names(points)
    row = {(p.run, p.compute): i for i, p in enumerate(means)}
    matrix = np.zeros((len(means), len(points)))
    for j, point in enumerate(points):
        matrix[row[names[point.run], point.compute], j] = 1.0
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True))


def mean_names(points: Sequence[Point]) -> dict[str, str]:
    """What the curve of each run is called: its own name, or that of the mean of its seeds."""
    seeds: dict[int, dict[str, int]] = {}  # by size: seed by run
    for point in points:
        seeds.setdefault(point.num_params, {})[point.run] = point.seed
    names: dict[str, str] = {}
    for size, seed_of in seeds.items():
        together = size > 0 and len(seed_of) > 1 and len(set(seed_of.values())) == len(seed_of)
        names |= {run: f"mean of {len(seed_of)} seeds, {size:,} parameters" if together else run for run in seed_of}
    return names


def _mean(name: str, group: list[Point]) -> Point:
    first = group[0]
    if len(group) == 1 and first.run == name:
        return first
    errors = [p.stderr for p in group if p.stderr is not None]
    stderr = math.sqrt(sum(e * e for e in errors)) / len(group) if len(errors) == len(group) else None
    return dataclasses.replace(first, run=name, value=sum(p.value for p in group) / len(group), stderr=stderr)
