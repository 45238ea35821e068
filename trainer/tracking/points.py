"""What a tracker is told about a run, as plain data built from its files. Standard library only.

Metric names: `train/<name>` or `speed/<name>` for training records, with `train/compute` beside them;
`<metric>/<split>` and `<metric>/<split>_stderr` for evaluations, with `compute` at the same steps. The step is nimg.
The two compute metrics are apart because a chart's x axis may be any metric, but only one that exists at exactly the
steps it draws.

`<metric>/<split> by GFLOP` repeats an evaluation with its compute as the step: MLflow 3.17 draws a logarithmic x axis
over steps only, and the scaling curve is wanted on log-log axes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.files import write_json
from trainer.tracking.records import EvalRecord, TrainRecord
from trainer.tracking.uri import is_secret

NUM_PARAMS = "num_params"
TRAIN_COMPUTE = "train/compute"
COMPUTE = "compute"
STDERR = "_stderr"
BY_COMPUTE = " by GFLOP"
LAW_FILE = "law_runs.json"
LONGEST_KEY = 234  # of an evaluation: MLflow takes 250 characters, and the prefix of its tag is 16
EXPERIMENT_FILE = "experiment.json"  # of a study: the tags of its experiment, saved views among them


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class LawRun:
    """A fit, or a study's report, as a tracker shows it: numbers, files, and curves drawn over the trials' own."""

    id: str  # unique to its content: the same fit again is the same run
    name: str
    study: str
    time: float  # Unix seconds
    metrics: dict[str, float] = field(default_factory=dict)  # parameters, intervals, R^2, ...
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # metric name -> [compute, value] pairs
    documents: dict[str, Any] = field(default_factory=dict)  # file name -> JSON
    carries_files: bool = False  # of the `law` folder: report, figures, points


def save_law_runs(folder: Path, runs: Sequence[LawRun]) -> None:
    """Write the runs of a `law` folder. One that was there before keeps its time, so that sending it adds nothing."""
    earlier = {run.id: run.time for run in load_law_runs(folder)}
    dated = [replace(run, time=earlier.get(run.id, run.time or time.time())) for run in runs]
    write_json(folder / LAW_FILE, {"runs": [asdict(run) for run in dated]})


def load_law_runs(folder: Path) -> list[LawRun]:
    """The runs of a `law` folder; none where it has no fit yet."""
    path = folder / LAW_FILE
    return [LawRun(**run) for run in json.loads(path.read_text())["runs"]] if path.exists() else []


def train_points(record: TrainRecord) -> Iterator[Point]:
    """The points of one training record. Its compute comes last: where that arrived, the others have."""
    time_ms = _milliseconds(record.time)
    for name, value in record.values.items():
        key = name if "/" in name else f"train/{name}"
        yield Point(key, _drawable(value), time_ms, record.nimg)
    yield Point(TRAIN_COMPUTE, record.compute, time_ms, record.nimg)


def eval_points(records: Iterable[EvalRecord]) -> dict[tuple[str, int], list[Point]]:
    """Points by (metric name, nimg): its compute, standard error and, last, its value.

    `compute` is a function of the step, so it always carries time 0: whichever evaluation brings it first, it is the
    same point and is stored once.
    """
    return {(key, nimg): list(_points_of(key, record)) for (key, nimg), record in _latest(records).items()}


def records_by_name(records: Iterable[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """The records behind the points of each metric name, by images seen."""
    found: dict[str, list[EvalRecord]] = {}
    for (key, _), record in sorted(_latest(records).items()):
        found.setdefault(key, []).append(record)
    return found


def _latest(records: Iterable[EvalRecord]) -> dict[tuple[str, int], EvalRecord]:
    """Records by (metric name, nimg); of several the latest counts."""
    latest: dict[tuple[str, int], EvalRecord] = {}
    usual: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: r.time):
        first = usual.setdefault((record.metric, record.split), _way(record))
        latest[_eval_key(record, first), record.nimg] = record
    return latest


def _points_of(key: str, record: EvalRecord) -> Iterator[Point]:
    time_ms, value = _milliseconds(record.time), _drawable(record.value)
    yield Point(COMPUTE, record.compute, 0, record.nimg)
    if record.stderr is not None:
        yield Point(f"{key}{STDERR}", _drawable(record.stderr), time_ms, record.nimg)
    yield Point(key + BY_COMPUTE, value, time_ms, _gflop(record.compute))
    yield Point(key, value, time_ms, record.nimg)


# How studies measure a likelihood; how they measure samples, the first record of a run says.
_USUAL_NLL = {
    "bound": "L_vlb", "mode": "importance", "respacing": None, "clip_denoised": True, "ensemble_below": None,
    "weights": "ema",
}  # fmt: skip


# Too long for a name. A classifier is named by its first digits, as in tables.
_HASHES = ("feature_weights_sha256", "reference", "train_data", "classifier_sha256", "classifier_config_sha256")
# What records of samples leave unsaid where it is so (`SamplingConfig.said`).
_UNSAID = {"threshold": "static", "corrector_steps": 0}


def _way(record: EvalRecord) -> dict[str, Any]:
    """What tells an evaluation from another one of the same metric and split."""
    made = {} if record.reconstructed is None else {"reconstructed": True}  # and not the tracked one of its length
    if record.metric == "nll":
        return made | {name: record.measured.get(name, usual) for name, usual in _USUAL_NLL.items()}
    said = {k: v for k, v in record.measured.items() if k not in _HASHES}
    if "classifier_sha256" in record.measured:
        said["classifier"] = record.measured["classifier_sha256"][:8]
    return _UNSAID | said | made | {"n": record.n}


def _eval_key(record: EvalRecord, first: dict[str, Any]) -> str:
    """`nll/test`; what was measured in another way than usual says so: `nll/test - mode exact`, `... - n 50000`.

    A key that is too long for a tracker is cut, and ends in a hash of the whole.
    """
    usual = _USUAL_NLL if record.metric == "nll" else first
    own = _way(record)
    unusual = [f"{k} {own.get(k)}" for k in sorted(own.keys() | usual.keys()) if own.get(k) != usual.get(k)]
    key = " - ".join([f"{record.metric}/{record.split}", *(re.sub(r"[^\w./ -]", "_", word) for word in unusual)])
    if len(key) <= LONGEST_KEY:
        return key
    digits = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{key[: LONGEST_KEY - len(digits) - 3]} - {digits}"


def law_points(law: LawRun) -> Iterator[Point]:
    """The law's numbers at step 0, and its curves against `compute`, which all curves share by step."""
    time_ms = _milliseconds(law.time)
    for key, value in law.metrics.items():
        if math.isfinite(value):
            yield Point(key, value, time_ms, 0)
    grid = sorted({compute for curve in law.curves.values() for compute, _ in curve})
    step_of = {compute: step for step, compute in enumerate(grid)}
    yield from (Point(COMPUTE, compute, time_ms, step) for compute, step in step_of.items())
    for key, curve in law.curves.items():
        for compute, value in curve:
            yield Point(key, value, time_ms, step_of[compute])
            yield Point(key + BY_COMPUTE, value, time_ms, _gflop(compute))


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """A nested config as `section.key` -> text, without anything that may hold a credential."""
    if isinstance(tree, dict) and tree:
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    if is_secret(prefix.rpartition(".")[2]):
        return {}
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree)}


def _gflop(compute: float) -> int:
    """Steps are whole numbers of at most 63 bits, which a great study's FLOPs are not; 0 has no place on a log axis."""
    return max(1, round(compute / 1e9))


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _drawable(value: float) -> float:
    """Infinity as NaN: MLflow would store it as 1.8e308, which flattens every chart."""
    return value if math.isfinite(value) else math.nan
