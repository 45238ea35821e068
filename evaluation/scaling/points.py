"""Points: one evaluated number of one run at one amount of training compute. From records, from and to CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from trainer.tracking.records import EvalRecord

Array = NDArray[np.float64]
Interval = tuple[float, float]  # lower and upper end

UNSTATED = "unstated"
# What must be equal before points may share a fit.
_IDENTITY = ("metric", "split", "flop_convention", "data", "measured")


@dataclass(frozen=True)
class Point:
    """One evaluated number."""

    metric: str  # such as "nll" (bits/dim) or "fd_efflite0"
    split: str  # "test" or "train"
    value: float
    stderr: float | None  # None where it was not estimated
    compute: float  # training FLOPs
    flop_convention: str
    num_params: int  # 0 where unknown
    images: int  # images seen in training; 0 where unknown
    run: str
    seed: int
    data: str = ""  # fingerprint of the data
    measured: str = ""  # canonical JSON of what exactly was measured


def point_from_record(record: EvalRecord) -> Point:
    """The point of an evaluation record. Distances depend on N, so N is part of what they measured."""
    measured = dict(record.measured)
    if record.metric != "nll":
        measured["n"] = record.n
    return Point(
        metric=record.metric,
        split=record.split,
        value=record.value,
        stderr=record.stderr,
        compute=record.compute,
        flop_convention=record.flop_convention,
        num_params=record.num_params,
        images=record.nimg,
        run=record.run,
        seed=record.seed,
        data=record.data,
        measured=json.dumps(measured, sort_keys=True),
    )


def points_from_records(records: Iterable[EvalRecord], *, metric: str, split: str) -> list[Point]:
    """The points of one metric on one split, by compute."""
    chosen = [point_from_record(r) for r in records if r.metric == metric and r.split == split]
    return sorted(chosen, key=lambda p: (p.compute, p.run))


def require_one_kind(points: Sequence[Point]) -> None:
    """Refuse points that must not share a fit: another metric, split, FLOP convention, data or way of measuring.

    Raises:
        DataError: names the field and two of its values, with a run of each.
    """
    for name in _IDENTITY:
        first = points[0] if points else None
        for point in points:
            if first is not None and getattr(point, name) != getattr(first, name):
                raise DataError(
                    f"points of different {name} cannot share a fit: {_difference(name, first, point)} "
                    f"(runs {first.run} and {point.run}). Fit them apart."
                )


def _difference(name: str, x: Point, y: Point) -> str:
    if name != "measured":
        return f"{getattr(x, name)!r} and {getattr(y, name)!r}"
    left, right = _items(x.measured), _items(y.measured)
    if left is None or right is None:
        return f"{x.measured!r} and {y.measured!r}"
    keys = sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))
    return ", ".join(f"{k} = {left.get(k)!r} and {right.get(k)!r}" for k in keys) or "the same, written differently"


def _items(measured: str) -> dict[str, object] | None:
    """What was measured, by name; None for a text that is not a JSON object, as others may have it."""
    try:
        found = json.loads(measured or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Columns:
    """Points as arrays, in the order given."""

    compute: Array  # [n]
    value: Array  # [n]
    stderr: Array | None  # [n]; None unless every point has a positive one
    run: NDArray[np.int64]  # [n] number of the point's run
    runs: tuple[str, ...]  # names by number


def columns(points: Sequence[Point]) -> Columns:
    """Points as arrays; standard errors count only if every point has one."""
    runs = tuple(dict.fromkeys(p.run for p in points))
    number = {name: i for i, name in enumerate(runs)}
    errors = np.array([np.nan if p.stderr is None else p.stderr for p in points])
    has_errors = len(points) > 0 and bool(np.all(np.isfinite(errors) & (errors > 0)))
    return Columns(
        np.array([p.compute for p in points], dtype=np.float64),
        np.array([p.value for p in points], dtype=np.float64),
        errors if has_errors else None,
        np.array([number[p.run] for p in points], dtype=np.int64),
        runs,
    )


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """Write points as CSV, atomically; an unknown standard error is an empty cell."""
    names = [f.name for f in dataclasses.fields(Point)]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for point in points:
        writer.writerow([_cell(getattr(point, name)) for name in names])
    write_atomic(path, buffer.getvalue())


def _cell(value: object) -> object:
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else value  # float(): numpy's floats are floats too
