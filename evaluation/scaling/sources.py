"""Points from wherever they lie: any CSV, a study's folder, or an experiment in MLflow."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from evaluation.scaling.points import UNSTATED, Point

MLFLOW = "mlflow:"
_ROUNDED_FROM = 1000  # below, a count that is not whole is rather given in millions or billions


@dataclass(frozen=True)
class ColumnNames:
    """Which column of a table holds what; None takes our own name where the table has it."""

    compute: str = "compute"
    value: str = "value"
    stderr: str | None = None
    run: str | None = None
    num_params: str | None = None
    images: str | None = None


@dataclass(frozen=True)
class Selection:
    """Which of several kinds of points is meant; None: any."""

    metric: str | None = None
    split: str | None = None


def read_points(place: str, names: ColumnNames | None = None, selection: Selection | None = None) -> list[Point]:
    """The points in a CSV file, a study's folder or `mlflow:EXPERIMENT`.

    Raises:
        DataError: nothing there, not readable, or several metrics or splits of which none was chosen.
    """
    names = names or ColumnNames()
    if place.startswith(MLFLOW):
        points = _from_mlflow(place.removeprefix(MLFLOW), names)
    else:
        path = Path(place)
        points = read_csv(path / "law" / "points.csv" if path.is_dir() else path, names)
    return _select(points, selection or Selection(), place)


def read_csv(path: Path, names: ColumnNames | None = None) -> list[Point]:
    """Read points from any CSV with a header; the fields whose columns are not named are read where they exist.

    Raises:
        DataError: no such file or column, or a cell that is not the number or count due (names the line).
    """
    names = names or ColumnNames()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file ({error}).") from error
    for name in dataclasses.astuple(names):
        if name is not None and name not in header:
            raise DataError(f"{path} has no column {name!r}; it has: {', '.join(header) or 'nothing'}.")
    if not rows:
        raise DataError(f"{path} has a header and no rows.")
    own: dict[str, str] = {field: field for field in ("stderr", "run", "num_params", "images") if field in header}
    own |= {field: column for field, column in dataclasses.asdict(names).items() if column is not None}
    return [_Row(path, line, row, own).point() for line, row in rows]


@dataclass(frozen=True)
class _Row:
    """One line of a CSV."""

    path: Path
    line: int
    cells: Mapping[str, str | None]
    column_of: Mapping[str, str]  # by field of Point

    def point(self) -> Point:
        value_column = self.column_of["value"]
        return Point(
            metric=self._text("metric", value_column),
            split=self._text("split", ""),
            value=self._required("value"),
            stderr=self._number("stderr"),
            compute=self._required("compute"),
            flop_convention=self._text("flop_convention", UNSTATED),
            num_params=self._count("num_params"),
            images=self._count("images"),
            run=self._text("run", f"row {self.line}"),
            seed=self._count("seed"),
            data=self._text("data", ""),
            measured=self._text("measured", ""),
        )

    def _text(self, field: str, default: str) -> str:
        return (self.cells.get(self.column_of.get(field, field)) or "").strip() or default

    def _number(self, field: str) -> float | None:
        text = self._text(field, "")
        if not text:
            return None
        try:
            return float(text)
        except ValueError:
            column = self.column_of.get(field, field)
            raise DataError(f"{self.path}, line {self.line}: {column} = {text!r} is not a number.") from None

    def _required(self, field: str) -> float:
        found = self._number(field)
        if found is None:
            raise DataError(f"{self.path}, line {self.line}: the cell of {self.column_of[field]!r} is empty.")
        return found

    def _count(self, field: str) -> int:
        """A whole number; large ones may come from a computation (6795600349.29) and are rounded."""
        found = self._number(field) or 0.0
        if not (math.isfinite(found) and found >= 0) or (found < _ROUNDED_FROM and found != int(found)):
            column, text = self.column_of.get(field, field), self._text(field, "")
            remedy = "" if field == "seed" else " (give counts, not billions)"
            raise DataError(f"{self.path}, line {self.line}: {column} = {text!r} is not a count{remedy}.")
        return round(found)


def _from_mlflow(experiment: str, names: ColumnNames) -> list[Point]:
    try:
        from trainer.tracking.mlflow_points import points_of_experiment
    except ImportError as error:
        raise DataError(f"MLflow is not installed here ({error}): pip install 'diffusion-scaling[tracking]'.") from None
    return [Point(**fields) for fields in points_of_experiment(experiment, **dataclasses.asdict(names))]


def _select(points: Sequence[Point], wanted: Selection, place: str) -> list[Point]:
    chosen = [
        p for p in points if wanted.metric in (None, p.metric) and (wanted.split is None or wanted.split == p.split)
    ]
    kinds = sorted({(p.metric, p.split) for p in points})
    listed = ", ".join(f"--metric {metric}" + (f" --split {split}" if split else "") for metric, split in kinds)
    if not chosen:
        raise DataError(f"{place} holds no such points; it holds: {listed or 'nothing'}.")
    if len({(p.metric, p.split) for p in chosen}) > 1:
        raise DataError(f"{place} holds several kinds of points: choose one of {listed}.")
    return chosen
