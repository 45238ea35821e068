"""Points: one evaluated number of one run at one amount of training compute. From records, from and to CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from trainer.tracking.records import EvalRecord

Array = NDArray[np.float64]

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
    left, right = (json.loads(p.measured) if p.measured else {} for p in (x, y))
    keys = sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))
    return ", ".join(f"{k} = {left.get(k)!r} and {right.get(k)!r}" for k in keys)


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


def read_csv(
    path: Path,
    *,
    compute: str = "compute",
    value: str = "value",
    stderr: str | None = None,
    run: str | None = None,
) -> list[Point]:
    """Read points from any CSV with a header, naming its columns; the other fields are read where they exist.

    Args:
        stderr: column of standard errors; by default `stderr` if there is one.
        run: column that names the run; by default `run` if there is one, else every row is a run of its own.

    Raises:
        DataError: no such file or column, or a cell that is not a number (names the row).
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file ({error}).") from error
    for name in (compute, value, stderr, run):
        if name is not None and name not in header:
            raise DataError(f"{path} has no column {name!r}; it has: {', '.join(header) or 'nothing'}.")
    if not rows:
        raise DataError(f"{path} has a header and no rows.")
    stderr = stderr or ("stderr" if "stderr" in header else None)
    run = run or ("run" if "run" in header else None)
    return [_row(path, n, row, compute, value, stderr, run) for n, row in enumerate(rows, start=2)]


def _row(
    path: Path, line: int, row: dict[str, Any], compute: str, value: str, stderr: str | None, run: str | None
) -> Point:
    def number(name: str | None, default: float | None = None) -> float | None:
        text = (row.get(name) or "").strip() if name else ""
        if not text:
            if default is None and name in (compute, value):
                raise DataError(f"{path}, line {line}: the cell of {name!r} is empty.")
            return default
        try:
            return float(text)
        except ValueError:
            raise DataError(f"{path}, line {line}: {name} = {text!r} is not a number.") from None

    def whole(name: str) -> int:
        found = number(name, 0.0)
        if found is None or not np.isfinite(found):
            raise DataError(f"{path}, line {line}: {name} = {row.get(name)!r} is not a whole number.")
        return int(found)

    def text(name: str, default: str) -> str:
        return (row.get(name) or "").strip() or default

    x, y = number(compute), number(value)
    assert x is not None
    assert y is not None
    return Point(
        metric=text("metric", value),
        split=text("split", ""),
        value=y,
        stderr=number(stderr),
        compute=x,
        flop_convention=text("flop_convention", UNSTATED),
        num_params=whole("num_params"),
        images=whole("images"),
        run=(row.get(run) or "").strip() if run else f"row {line}",
        seed=whole("seed"),
        data=text("data", ""),
        measured=text("measured", ""),
    )
