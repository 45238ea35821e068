"""The curves of all runs as series, a colour a model size; shared by the charts over compute and over images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from evaluation.report.chart import Marker, Series, joined
from evaluation.report.palette import SizeGroup
from evaluation.report.style import metric_label, size_label
from evaluation.scaling.law import Law
from evaluation.scaling.points import Point


def drawable(point: Point) -> bool:
    """Whether a log-log plane has a place for it."""
    return all(math.isfinite(v) and v > 0 for v in (point.value, point.compute))


def drawn_points(law: Law) -> list[Point]:
    """All points that have a place: of the runs, of their means, and those that are not fitted."""
    frontier = law.frontier
    every = (*frontier.admitted, *frontier.candidates, *(e.point for e in frontier.exclusions))
    return [p for p in dict.fromkeys(every) if drawable(p)]


def measured_points(law: Law) -> list[Point]:
    """All points as they were measured, fitted or not, without the means over seeds."""
    frontier = law.frontier
    means = set(frontier.candidates) - set(frontier.admitted)
    return [p for p in dict.fromkeys((*frontier.admitted, *(e.point for e in frontier.exclusions))) if p not in means]


def run_series(law: Law, groups: Sequence[SizeGroup], abscissa: str) -> Iterator[Series]:
    """Every run's curve, and over it the mean of the seeds, where there are several: it is what is fitted.

    Args:
        abscissa: the point's field on the x axis.
    """
    frontier, words = law.frontier, Words(law)
    yield from _early(law, groups, abscissa, words)
    means = set(frontier.candidates) - set(frontier.admitted)
    for group in groups:
        runs = [run for run in by_run(frontier.admitted) if run[0].num_params in group.sizes]
        averaged = [run for run in by_run(means) if run[0].num_params in group.sizes]
        if runs and averaged:
            yield curve_series(runs, group, abscissa, words, size=2.5, width=0.7, opacity=0.55, errors=False)
        if averaged or runs:
            yield curve_series(averaged or runs, group, abscissa, words, label=group.label)


def by_run(points: Iterable[Point]) -> list[list[Point]]:
    """The runs' points by compute, small sizes first."""
    runs: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.num_params, p.run, p.compute)):
        runs.setdefault(point.run, []).append(point)
    return list(runs.values())


class Words:
    """What the pointer says of a point."""

    def __init__(self, law: Law) -> None:
        self._metric = metric_label(law.metric)
        self._reasons = {e.point: e.reason for e in law.frontier.exclusions}
        self._on_frontier, self._admitted = set(law.frontier.points), set(law.frontier.admitted)

    def of(self, point: Point) -> tuple[str, ...]:
        stderr = "" if point.stderr is None else f" ± {point.stderr:.3g}"
        images = [f"{point.images:,} images"] if point.images else []
        seed = "" if point.run.startswith("mean of ") else f", seed {point.seed}"
        return (
            f"{point.run}{seed}",
            ", ".join([size_label(point.num_params), *images, f"{point.compute:.4g} FLOPs"]),
            f"{self._metric}: {point.value:.5g}{stderr}",
            *([standing] if (standing := self._standing(point)) else []),
        )

    def _standing(self, point: Point) -> str:
        if point in self._on_frontier:
            return "on the frontier"
        if point in self._reasons:
            return f"not on the frontier: {self._reasons[point]}"
        return "a part of the mean over its size's seeds" if point in self._admitted else ""


def curve_series(
    runs: Sequence[Sequence[Point]],
    group: SizeGroup,
    abscissa: str,
    words: Words,
    *,
    label: str = "",
    size: float = 4.5,
    width: float = 1.3,
    opacity: float = 1.0,
    errors: bool = True,
) -> Series:
    """The runs of one size group as one series, with a gap between them."""
    flat = [p for run in runs for p in (*run, None)]
    x, y = joined([[(float(getattr(p, abscissa)), p.value) for p in run] for run in runs])
    error = [p.stderr or 0.0 if p else 0.0 for p in flat]
    dot: Marker = "dot"
    return Series(
        x, y, group.colour, label, "sizes", group.label, marker=dot, size=size, opacity=opacity,
        width=width if any(len(run) > 1 for run in runs) else 0.0,
        error=(error, error) if errors and any(error) else None,
        hover=[() if p is None else words.of(p) for p in flat],
    )  # fmt: skip


def _early(law: Law, groups: Sequence[SizeGroup], abscissa: str, words: Words) -> Iterator[Series]:
    """Points that come too early to be fitted, and the way from them to their run's first that is; faint."""
    first = {run[0].run: run[0] for run in by_run(law.frontier.admitted)}
    known = {*law.frontier.admitted, *law.frontier.candidates}
    early = by_run(e.point for e in law.frontier.exclusions if e.point not in known and drawable(e.point))
    for group in groups:
        chosen = [run for run in early if run[0].num_params in group.sizes]
        paths = [[*run, *([first[run[0].run]] if run[0].run in first else [])] for run in chosen]
        if paths:
            yield curve_series(paths, group, abscissa, words, size=3, width=1.0, opacity=0.3, errors=False)
