"""A study's report: every law, curve and picture in one HTML file, and the same figures for print beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files import write_atomic
from evaluation.report import html_page as page
from evaluation.report.chart import Chart
from evaluation.report.curve_charts import curves_chart, gap_chart
from evaluation.report.figures import draw, save_figure
from evaluation.report.law_chart import law_chart
from evaluation.report.run_files import RunFiles, RunRecords, read_runs
from evaluation.report.run_series import measured_points
from evaluation.report.sample_grids import Strip, data_uri, draw_samples, sample_strips
from evaluation.report.size_charts import SizeFindings, budget_table, isoflop_chart, size_data_chart, size_findings
from evaluation.report.style import is_difference, law_title, size_label, status_label
from evaluation.report.tables import (
    backtest_table,
    fits_table,
    hold_out_table,
    points_table,
    predictions_table,
    slopes_table,
)
from evaluation.report.text_table import Table
from evaluation.report.training_charts import quartiles_chart, speed_chart
from evaluation.scaling.law import Law
from evaluation.scaling.seeds import average_seeds

_CAPTIONS = {
    "law": "Value against training compute. Thin lines are runs, strong ones the mean over seeds; bars are one "
    "standard error. Rings mark the frontier, which the laws are fitted to; beyond it they are dashed. The band "
    "belongs to the form that describes the frontier best; below is what that form leaves unexplained. Point at "
    "anything to read it; click a name in the legend to hide or show it.",
    "curves": "The same values against the images seen: how far each size has come, and whether it still learns.",
    "gap": "Above zero the networks do better on the images they were trained on than on held-out ones.",
    "isoflop": "A curve a budget of compute, between the sizes' learning curves; crosses mark the minima. Dotted: the "
    "minimum lies beyond the sizes, or its curvature is not larger than its error.",
    "size_data": "Dots were measured, lines are L(N, D) = E + A/N^α + B/D^β at each size. Every point is fitted, not "
    "the frontier only.",
    "quartiles": "Means over each quarter of the timesteps, as under uniform t, in bins that are equal in log images.",
    "speed": "Medians over each run's logging intervals, with data, logging and checkpoints in them.",
    "samples": "The same noise for every picture; from left to right, as training goes on.",
}


@dataclass(frozen=True)
class ReportFiles:
    """What was written."""

    html: Path
    sizes: SizeFindings | None  # of the main law
    figures: dict[str, Path]  # PNG by name, such as "nll_test", "nll_test_curves", "samples"; most have an SVG beside


def write_report(folder: Path, laws: Sequence[Law], runs: Sequence[RunFiles], *, title: str) -> ReportFiles:
    """Write report.html and the figures into a folder.

    Args:
        laws: the main one first.
        runs: where the training records and sample grids are; none: the report has the laws only.
    """
    records = read_runs(sorted(runs, key=lambda run: (run.num_params, run.seed, run.name)))
    strips = sample_strips(records)
    sizes = next((found for law in laws[:1] if (found := size_findings(law)) is not None), None)
    charts = dict(_charts(laws, records, sizes, study=title))
    write_atomic(folder / "report.html", _html(title, laws, records, charts, strips, sizes))
    figures = {name: folder / f"{name}.png" for name in charts}
    for name, path in figures.items():
        figure = draw(charts[name])
        save_figure(figure, path)
        figure.set_layout_engine("none")  # everything has its place now; finding it takes most of the time
        save_figure(figure, path.with_suffix(".svg"))
    if strips:
        figures["samples"] = folder / "samples.png"
        save_figure(draw_samples(strips, title="Samples along training"), figures["samples"])
    return ReportFiles(folder / "report.html", sizes, figures)


def law_name(law: Law) -> str:
    """A law's name in file names: nll_test."""
    return f"{law.metric}_{law.split}" if law.split else law.metric


def _charts(
    laws: Sequence[Law], records: Sequence[RunRecords], sizes: SizeFindings | None, *, study: str
) -> Iterator[tuple[str, Chart]]:
    """Every chart that has something to show, by name."""
    for law in laws:
        if not is_difference(law.metric):
            yield law_name(law), law_chart(law, title=f"{study}: {law_title(law.metric, law.split)}")
        curves = gap_chart(law) if is_difference(law.metric) else curves_chart(law)
        if curves is not None:
            yield f"{law_name(law)}_curves", curves
    others = {
        "isoflop": isoflop_chart(sizes) if sizes is not None else None,
        "size_data": size_data_chart(sizes) if sizes is not None else None,
        "loss_by_timestep": quartiles_chart(records),
        "speed": speed_chart(records),
    }
    yield from ((name, chart) for name, chart in others.items() if chart is not None)


def _html(
    title: str,
    laws: Sequence[Law],
    records: Sequence[RunRecords],
    charts: dict[str, Chart],
    strips: Sequence[Strip],
    sizes: SizeFindings | None,
) -> str:
    sections = [(law_title(law.metric, law.split), _law_section(law, charts)) for law in laws]
    if sizes is not None:
        sections.insert(1, ("What size for a budget", _size_section(sizes, charts)))
    sections.append(("Training", _training_section(laws, records, charts)))
    if strips:
        sections.append(("Samples", _samples_section(strips)))
    sections.append(("How it was measured", _method_section(laws)))
    points = sum(len(measured_points(law)) for law in laws)
    lead = f"{len(laws)} laws from {points:,} evaluated points of {len(records)} runs" if records else ""
    return page.page(title, lead, [(heading, markup) for heading, markup in sections if markup])


def _law_section(law: Law, charts: dict[str, Chart]) -> str:
    """The verdict first, then the numbers, the figures, and the tables to look things up in."""
    curves = charts.get(f"{law_name(law)}_curves")
    if is_difference(law.metric):
        return "" if curves is None else page.chart_figure(curves, _CAPTIONS["gap"]) + page.table(gap_table(law))
    return "".join(
        [
            page.paragraph(law.verdict, kind="verdict"),
            page.notes(law.notes[1:]),
            page.table(fits_table(law)),
            page.table(predictions_table(law)),
            page.chart_figure(charts[law_name(law)], _CAPTIONS["law"]),
            "" if curves is None else page.chart_figure(curves, _CAPTIONS["curves"]),
            page.folded("Every point, and why it is on the frontier or not", page.table(points_table(law))),
            page.folded("Slope of each size's own curve", page.table(slopes_table(law))),
            page.folded("Held-out points one by one", page.table(hold_out_table(law))),
            page.folded("Backtest: fitted below a cut, held against what came later", page.table(backtest_table(law))),
        ]
    )


def _size_section(sizes: SizeFindings, charts: dict[str, Chart]) -> str:
    """The answer by L(N, D) first, then what it and the parabolas rest on."""
    doubt = f" ({sizes.size_data.message.rstrip('.')})" if sizes.size_data.message else ""
    parts = [page.paragraph(f"L(N, D) of {sizes.title}, {status_label(sizes.size_data.status)}{doubt}:")]
    parts.append(page.table(budget_table(sizes)))
    for name in ("size_data", "isoflop"):
        if name in charts:
            parts.append(page.chart_figure(charts[name], _CAPTIONS[name]))
    return "".join(parts)


def gap_table(law: Law) -> Table:
    """The difference at the last point of each size, the mean over its seeds."""
    last = {p.run: p for p in sorted(average_seeds(measured_points(law)), key=lambda p: p.compute)}
    rows = []
    for point in sorted(last.values(), key=lambda p: p.num_params):
        stderr = "" if point.stderr is None else f" ± {point.stderr:.3f}"
        rows.append([point.run, size_label(point.num_params), f"{point.images:,}", f"{point.value:+.3f}{stderr}"])
    return Table(["at the last point of", "parameters", "images", "difference"], rows, left=(0,))


def _training_section(laws: Sequence[Law], records: Sequence[RunRecords], charts: dict[str, Chart]) -> str:
    if not records:
        return ""
    parts = [page.table(runs_table(laws, records))]
    for name, caption in (("loss_by_timestep", "quartiles"), ("speed", "speed")):
        if name in charts:
            parts.append(page.chart_figure(charts[name], _CAPTIONS[caption]))
    return "".join(parts)


def runs_table(laws: Sequence[Law], records: Sequence[RunRecords]) -> Table:
    """One line a run: what it cost, how fast it was, and what it reached at its last evaluated point."""
    last = [{p.run: p for p in sorted(measured_points(law), key=lambda p: p.compute)} for law in laws]
    rows = []
    for run in records:
        speed, mfu = run.median("speed/img_per_second"), run.median("speed/mfu")
        end = run.records[-1] if run.records else None
        row = [run.run.name, size_label(run.run.num_params), str(run.run.seed)]
        row += [f"{end.nimg:,}", f"{end.compute:.3g}"] if end else ["", ""]
        row += ["" if speed is None else f"{speed:.4g}", "" if mfu is None else f"{mfu:.1%}"]
        for points in last:
            point = points.get(run.run.name)
            stderr = "" if point is None or point.stderr is None else f" ± {point.stderr:.3f}"
            row.append("" if point is None else f"{point.value:.4g}{stderr}")
        rows.append(row)
    names = [f"{law.metric} {law.split}".strip() for law in laws]
    header = ["run", "parameters", "seed", "images", "FLOPs", "images/s", "MFU", *names]
    return Table(header, rows, left=(0,))


def _samples_section(strips: Sequence[Strip]) -> str:
    parts = [page.paragraph(_CAPTIONS["samples"])]
    for strip in strips:
        parts.append(page.heading(f"{strip.label} parameters"))
        parts.append(page.strip([(data_uri(grid.path), grid.label) for grid in strip.grids]))
    return "".join(parts)


def _method_section(laws: Sequence[Law]) -> str:
    """What a reader must know before comparing these numbers with others."""
    parts = []
    for law in laws:
        seeds = sorted({p.seed for p in law.frontier.admitted})
        found = next((f.uncertainty for f in law.fits if f.uncertainty is not None), None)
        intervals = ""
        if found is not None:
            intervals = f"{found.confidence:.0%}, from {found.num_rounds:,} rounds over {found.num_runs} curves"
        parts.append(page.heading(law_title(law.metric, law.split)))
        parts.append(
            page.facts(
                [
                    ("compute", f"training FLOPs: {law.flop_convention}" if law.flop_convention else ""),
                    ("points", f"{len(law.frontier.admitted)} fitted or compared, of {len(measured_points(law))}"),
                    ("seeds", ", ".join(map(str, seeds))),
                    ("intervals", intervals),
                    ("data", law.data),
                    ("measured", _words(law.measured)),
                ]
            )
        )
    parts.append(page.notes(_STATUSES))
    return "".join(parts)


_STATUSES = (
    "ok: the points determine the form, and its intervals were checked on studies like this one.",
    "uncalibrated: the numbers stand, the intervals hint at the uncertainty and may be too narrow.",
    "unidentified: the points do not determine the parameters; the form is named and not drawn.",
    "Held-out error: the form is fitted to the lower two thirds of (log) compute and held against the frontier above.",
    "AICc compares forms on the same points, the lower the better; it knows nothing of what lies beyond them.",
)


def _words(measured: str) -> str:
    """Canonical JSON of what was measured, as name = value."""
    try:
        values = json.loads(measured)
    except ValueError:
        return measured
    return ", ".join(f"{k} = {v}" for k, v in values.items()) if isinstance(values, dict) else measured
