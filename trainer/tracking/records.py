"""The metric record and its files. No third-party package: the files are the truth, MLflow is a view of them.

A run folder holds `metrics.<n>.jsonl` segments (training records; a resume at nimg n opens segment n and so
replaces what an earlier segment said at or beyond n) and `evals/<nimg>/<key>.json` (evaluation records).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import DataError

FLOP_CONVENTION = "2 per multiply-add, training = 3 x forward"


@dataclass(frozen=True)
class TrainRecord:
    """What one logging interval of training saw."""

    nimg: int  # images seen at its end: the clock
    compute: float  # training FLOPs at its end
    time: float  # Unix seconds
    values: dict[str, float]  # by metric name


@dataclass(frozen=True)
class EvalRecord:
    """One evaluated number, with all that makes it comparable to another."""

    metric: str  # such as "nll" or "fd_efflite0"
    split: str  # which images: "test", "train"
    value: float
    stderr: float | None  # None where it was not estimated
    n: int  # network calls (NLL) or samples (distances)
    seeds: list[int]
    measured: dict[str, Any]  # what exactly: bound, T, clipping, feature net and hash, ...; only equal ones compare
    data: str  # fingerprint of the data
    weights: str  # sha256 of the evaluated weights file
    run: str
    nimg: int
    compute: float  # training FLOPs
    num_params: int
    flops_per_image: float  # training FLOPs of one image
    seed: int  # the training run's seed
    flop_convention: str = FLOP_CONVENTION
    details: dict[str, Any] = field(default_factory=dict)  # what came out beside the value: parts, floor, ...
    time: float = field(default_factory=time.time)

    @property
    def way(self) -> dict[str, Any]:
        """What exactly was measured. Distances depend on N, so N is part of it."""
        return self.measured if self.metric == "nll" else self.measured | {"n": self.n}

    @property
    def reconstructed(self) -> dict[str, Any] | None:
        """Of weights that are an average made after training its `profile_error` and `num_snapshots`; else None."""
        return self.details.get("reconstructed")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EvalRecord:
        """Rebuild a record; unknown keys (a newer version's) are left out."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in value.items() if k in names})


class RecordWriter:
    """Appends training records to the segment that begins at `nimg`; each line reaches the file at once."""

    def __init__(self, run_folder: Path, nimg: int) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        for start, path in segments(run_folder):
            if start > nimg:  # written by a life of this run that the resume has rolled back
                path.unlink()
        self.path = run_folder / f"metrics.{nimg}.jsonl"
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, record: TrainRecord) -> None:
        self._file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the segment. A disk that is full has been reported by the write that met it."""
        with contextlib.suppress(OSError):
            self._file.flush()
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()


def segments(run_folder: Path) -> list[tuple[int, Path]]:
    """The run's metric segments as (first nimg, path), in order."""
    found = []
    for path in run_folder.glob("metrics.*.jsonl"):
        start = path.name.split(".")[1]
        if start.isdigit():
            found.append((int(start), path))
    return sorted(found)


@dataclass(frozen=True)
class Place:
    """How far a run's training records have been read: a segment, an offset in it, and the bytes before the offset.

    The bytes (each line holds a time, so they are never those of another line) prove that the file is still the one
    that was read: a resume may have begun it anew.
    """

    segment: int = -1
    offset: int = 0
    before: str = ""


_CHECKED_BYTES = 200


def read_train_records(run_folder: Path) -> Iterator[TrainRecord]:
    """All valid training records in order of nimg; a half-written last line is left out."""
    yield from read_new_train_records(run_folder, Place())[0]


def first_train_record(run_folder: Path) -> TrainRecord | None:
    """The run's first training record."""
    for _, path in segments(run_folder)[:1]:
        with open(path, encoding="utf-8") as file:
            line = file.readline()
        return TrainRecord(**json.loads(line)) if line.endswith("\n") else None
    return None


def read_new_train_records(run_folder: Path, place: Place) -> tuple[list[TrainRecord], Place]:
    """The valid training records beyond a place, and the place behind them. Only new bytes are read.

    Where an earlier life's segment goes on beyond a resume, or was begun anew, records may come again that were read
    before: nimg tells.
    """
    parts = segments(run_folder)
    if place.segment not in [start for start, _ in parts]:
        place = Place()
    records: list[TrainRecord] = []
    for (start, path), following in zip(parts, [*parts[1:], None], strict=False):
        if start < place.segment:
            continue
        with open(path, "rb") as file:
            offset = _valid_offset(file, place) if start == place.segment else 0
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                offset += len(line)
                record = TrainRecord(**json.loads(line))
                # A record describes the interval that ends at nimg: the resume kept one at exactly the next start.
                if following is not None and record.nimg > following[0]:
                    break
                if record.nimg >= start:
                    records.append(record)
            place = Place(start, offset, _bytes_before(file, offset))
    return records, place


def _valid_offset(file: BinaryIO, place: Place) -> int:
    """The place's offset, or 0 where the file is not the one that was read."""
    return place.offset if _bytes_before(file, place.offset) == place.before else 0


def _bytes_before(file: BinaryIO, offset: int) -> str:
    file.seek(max(0, offset - _CHECKED_BYTES))
    return file.read(min(offset, _CHECKED_BYTES)).decode("utf-8", "replace")


@dataclass(frozen=True)
class Evaluation:
    """A file of evaluation records."""

    path: Path
    name: str  # for people
    data: str  # where the images lie
    records: list[EvalRecord]


def read_evaluations(run_folder: Path) -> list[Evaluation]:
    """All evaluations of a run, by images seen. Raises DataError for a file that is damaged."""
    return [read_evaluation(path) for path in sorted(run_folder.glob("evals/*/*.json"))]


def read_eval_records(run_folder: Path) -> list[EvalRecord]:
    """All evaluation records of a run, by nimg, split and metric. Raises DataError for a file that is damaged."""
    records = [record for evaluation in read_evaluations(run_folder) for record in evaluation.records]
    return sorted(records, key=lambda r: (r.nimg, r.metric, r.split))


def read_result(path: Path) -> list[EvalRecord]:
    """The records of one evaluation. Raises DataError when the file is damaged."""
    return read_evaluation(path).records


def read_evaluation(path: Path) -> Evaluation:
    """One evaluation. Raises DataError when the file is damaged."""
    try:
        value = json.loads(path.read_text())
        records = [EvalRecord.from_json(record) for record in value["records"]]
        return Evaluation(path, value.get("name", path.stem), (value.get("spec") or {}).get("data", ""), records)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no file of evaluation records ({error}): delete it and measure again.") from None
