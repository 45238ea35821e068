"""The end of a study: its points, laws, tables and figures as files in STUDY/law, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.files.folder import StudyFolder
from cluster.words import flops, format_table
from data_pipeline.files import write_atomic, write_json
from evaluation.report import study_report
from evaluation.report.law_runs import curve_name, law_runs
from evaluation.report.run_files import RunFiles
from evaluation.report.size_charts import SizeFindings
from evaluation.report.style import is_fitted, metric_label, size_label, split_label
from evaluation.report.tables import fits_table, law_report
from evaluation.scaling.law import Law, fit_law
from evaluation.scaling.points import Point, point_from_record, write_csv
from trainer.tracking.points import save_law_runs
from trainer.tracking.records import EvalRecord

GAP = "nll_gap"  # held-out NLL minus that on training images


@dataclass(frozen=True)
class Report:
    """What was found, and where it is."""

    text: str  # for the terminal
    figure: Path | None  # of the main law
    curves: tuple[str, ...]  # metric names as MLflow has them, the main one first


def write_report(folder: StudyFolder) -> Report:
    """Fit all laws to what is evaluated so far and write them down."""
    records = {name: _named(folder.current_records(name), name) for name in folder.trials}
    fitted = [record for name, trial in folder.trials.items() if trial.fitted for record in records[name]]
    points = [point_from_record(record) for record in fitted]
    points += [gap for name, trial in folder.trials.items() if trial.fitted for gap in gap_points(records[name])]
    folder.law.mkdir(parents=True, exist_ok=True)
    write_csv(folder.law / "points.csv", points)
    laws = [fit_law(group) for group in _groups(points) if is_fitted(group[0].metric)]
    text = "\n\n".join([trials_table(folder, records), *(_law_text(law, main=i == 0) for i, law in enumerate(laws))])
    quality = _quality_text([record for group in records.values() for record in group])
    text += f"\n\n{quality}" if quality else ""
    full = "\n\n\n".join([trials_table(folder, records), *(law_report(law) for law in laws), quality])
    write_atomic(folder.law / "report.txt", full + "\n")
    written = study_report.write_report(folder.law, laws, _run_files(folder), title=folder.study.name)
    _write_laws(folder, laws, written.sizes)
    drawn = [written.figures[name] for law in laws if (name := study_report.law_name(law)) in written.figures]
    return Report(text, drawn[0] if drawn else None, tuple(curve_name(law) for law in laws if law.metric != GAP))


def gap_points(records: Sequence[EvalRecord]) -> list[Point]:
    """Held-out minus training NLL of one trial, where both were measured; the two are independent estimates."""
    on_training = {r.nimg: r for r in records if r.metric == "nll" and r.split == "train"}
    gaps = []
    for test in sorted((r for r in records if r.metric == "nll" and r.split == "test"), key=lambda r: r.nimg):
        train = on_training.get(test.nimg)
        if train is not None:
            stderr = None if test.stderr is None or train.stderr is None else math.hypot(test.stderr, train.stderr)
            point = point_from_record(test)
            gaps.append(dataclasses.replace(point, metric=GAP, split="", value=test.value - train.value, stderr=stderr))
    return gaps


def trials_table(folder: StudyFolder, records: dict[str, list[EvalRecord]]) -> str:
    """One line a trial: what it cost and what it reached at its last evaluated point."""
    metrics = sorted(
        {(r.metric, r.split) for group in records.values() for r in group if is_fitted(r.metric)}, key=_order
    )
    header = ["trial", "size", "parameters", "images", "FLOP", *(f"{m} {s}" for m, s in metrics)]
    rows = []
    for name, trial in folder.trials.items():
        last = {(r.metric, r.split): r for r in sorted(records[name], key=lambda r: r.nimg)}
        result = folder.run_folder(name) / "result.json"
        nimg = int(json.loads(result.read_text())["nimg"]) if result.exists() else 0
        cells = [_cell(last[metric]) if metric in last else "-" for metric in metrics]
        row = [name, trial.label, size_label(trial.cost.num_params), f"{nimg:,}", flops(nimg * trial.cost.train_flops)]
        rows.append([*row, *cells])
    return format_table(header, rows)


def _write_laws(folder: StudyFolder, laws: Sequence[Law], sizes: SizeFindings | None) -> None:
    write_json(folder.law / "law.json", {"study": folder.study.name, "laws": [law.to_json() for law in laws]})
    size_data = {curve_name(laws[0]): sizes.size_data} if sizes is not None else {}
    shown = [law for law in laws if law.metric != GAP]  # a difference has no law: its table is in the report
    save_law_runs(folder.law, law_runs(shown, study=folder.study.name, size_data=size_data))


def _groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points by metric and split, held-out NLL first."""
    kinds = sorted({(point.metric, point.split) for point in points}, key=_order)
    return [[point for point in points if (point.metric, point.split) == kind] for kind in kinds]


def _order(kind: tuple[str, str]) -> tuple[int, str, str]:
    rank = {("nll", "test"): 0, ("nll", "train"): 1, (GAP, ""): 3}
    return rank.get(kind, 2), *kind


def _run_files(folder: StudyFolder) -> list[RunFiles]:
    return [
        RunFiles(name, folder.run_folder(name), trial.cost.num_params, trial.seed)
        for name, trial in folder.trials.items()
    ]


def _law_text(law: Law, *, main: bool) -> str:
    """The main law in full, of the others the fits and what they mean."""
    if main:
        return law_report(law)
    name = "NLL gap: held-out minus training images (bits/dim)" if law.metric == GAP else metric_label(law.metric)
    where = f" on {split_label(law.split)}" if law.split else ""
    notes = "\n".join(f"  - {note}" for note in law.notes)
    return f"{name}{where}\n\n{_gap_table(law) if law.metric == GAP else fits_table(law)}\n\n{notes}"


def _gap_table(law: Law) -> str:
    last: dict[str, Point] = {p.run: p for p in sorted(law.frontier.candidates, key=lambda p: p.compute)}
    rows = [
        [p.run, f"{p.images:,}", flops(p.compute), f"{p.value:+.3f} ± {p.stderr or 0.0:.3f}"] for p in last.values()
    ]
    return format_table(
        ["  at each trial's last point", "images", "FLOP", "gap"], [[f"  {r[0]}", *r[1:]] for r in rows]
    )


def _quality_text(records: Sequence[EvalRecord]) -> str:
    """Sample quality at each trial's last point, a column a metric; under it what real images would get."""
    last: dict[tuple[str, str], EvalRecord] = {}
    for record in sorted(records, key=lambda r: r.nimg):
        if record.metric != "nll":
            last[record.run, record.metric] = record
    if not last:
        return ""
    metrics = sorted({metric for _, metric in last}, key=lambda metric: (not is_fitted(metric), metric))
    rows = [
        [run, *(_cell(last[run, m]) if (run, m) in last else "-" for m in metrics)]
        for run in dict.fromkeys(run for run, _ in last)
    ]
    floors = {metric: record.details.get("floor") for (_, metric), record in last.items()}
    if any(floor is not None for floor in floors.values()):
        rows.append(["real against real", *(f"{f:.4g}" if (f := floors[m]) is not None else "-" for m in metrics)])
    one = next((record for record in last.values() if "feature_net" in record.measured), next(iter(last.values())))
    how = f"N = {one.n:,}, {one.measured['sampler']} sampler, respacing {one.measured['respacing']}"
    return f"sample quality at each trial's last point, {how}\n\n{format_table(['trial', *metrics], rows)}"


def _named(records: Sequence[EvalRecord], name: str) -> list[EvalRecord]:
    """Records under their trial's name instead of the run's id."""
    return [dataclasses.replace(record, run=name) for record in records]


def _cell(record: EvalRecord) -> str:
    return f"{record.value:.4g}" if record.stderr is None else f"{record.value:.3f} ± {record.stderr:.3f}"
