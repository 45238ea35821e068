"""Two final tables of one study, point by point: bit for bit, or within a tolerance where the layout had changed."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_watch import StudyWatch

TOLERANCE = 0.01  # bits/dim

Row = dict[str, str]
Key = tuple[str, str, str, int]  # run, metric, split, images


@dataclass(frozen=True)
class Comparison:
    """How a table differs from that of the undisturbed study."""

    num_points: int
    num_identical: int  # in every column, as text
    num_relaid: int  # points behind a change of their trial's layout, for which the tolerance holds
    largest: float  # difference of those in bits/dim; 0.0 where there are none
    largest_distance: float  # likewise, relative, of the other metrics
    relaid: tuple[str, ...]  # trials whose layout changed, and where
    wrong: tuple[str, ...] = field(default=())  # what speaks against equality

    @property
    def equal(self) -> bool:
        return not self.wrong


def compare(undisturbed: StudyWatch, disturbed: StudyWatch) -> Comparison:
    """Compare STUDY/law/points.csv of the two."""
    expected, found = _table(undisturbed.out), _table(disturbed.out)
    wrong = [f"missing: {key}" for key in expected.keys() - found.keys()]
    wrong += [f"not in the undisturbed table: {key}" for key in found.keys() - expected.keys()]
    same_until = {run.name: _same_until(undisturbed, disturbed, run.name) for run in undisturbed.trials()}
    identical, relaid, largest, distance = 0, 0, 0.0, 0.0
    for key in sorted(expected.keys() & found.keys()):
        run, metric, _, images = key
        behind = images > same_until[run]
        relaid += behind
        identical += expected[key] == found[key]
        difference = abs(float(found[key]["value"]) - float(expected[key]["value"]))
        in_bits = metric.startswith("nll")
        if behind and in_bits:
            largest = max(largest, difference)
        elif behind:
            distance = max(distance, difference / abs(float(expected[key]["value"])))
        if _is_wrong(expected[key], found[key], behind=behind, too_far=in_bits and difference > TOLERANCE):
            wrong.append(f"{key}: {found[key]['value']} instead of {expected[key]['value']}")
    changed = tuple(f"{run} from {images:,} images on" for run, images in same_until.items() if images < float("inf"))
    return Comparison(len(expected), identical, relaid, largest, distance, changed, tuple(wrong))


def _is_wrong(expected: Row, found: Row, *, behind: bool, too_far: bool) -> bool:
    """Behind a change of layout value and standard error may differ within the tolerance, the rest may not."""
    if not behind:
        return found != expected
    measured = ("value", "stderr")
    return too_far or any(found[name] != expected[name] for name in expected if name not in measured)


def _same_until(undisturbed: StudyWatch, disturbed: StudyWatch, trial: str) -> float:
    """Images up to which a trial was computed in the undisturbed study's layout; infinity: all of them."""
    usual = next(iter(undisturbed.layouts(trial).values()))
    last = 0
    for images, layout in disturbed.layouts(trial).items():
        if layout != usual:
            return last
        last = images
    return float("inf")


def _table(out: Path) -> dict[Key, Row]:
    with open(out / "law" / "points.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = {(row["run"], row["metric"], row["split"], int(row["images"])): row for row in rows}
    if len(table) != len(rows):
        raise AssertionError(f"{out / 'law' / 'points.csv'} holds a point twice")
    return table
