"""Tables of a law (points, slopes, fits, tests beyond the range), and of what was measured of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.report.law_numbers import parameters
from evaluation.report.style import form_label, metric_label, size_label, split_label, status_label
from evaluation.report.text_table import INDENT, Table
from evaluation.scaling.law import Law, LawFit
from evaluation.scaling.points import Point
from trainer.tracking.records import EvalRecord


def law_report(law: Law) -> str:
    """Everything about one metric's law: points, slopes, fits, their tests, and what it means."""
    where = f" on {split_label(law.split)}" if law.split else ""
    parts = [
        f"{metric_label(law.metric)}{where} against training compute ({law.flop_convention})",
        points_table(law),
        slopes_table(law),
        fits_table(law),
        predictions_table(law),
        hold_out_table(law),
        "\n".join(f"{INDENT}- {note}" for note in law.notes),
    ]
    return "\n\n".join(str(part) for part in parts if not isinstance(part, Table) or part.rows)


def points_table(law: Law) -> Table:
    """Every point by size and compute; `*` marks the frontier, the last column says why others are not on it."""
    frontier = set(law.frontier.points)
    reasons = {e.point: e.reason for e in law.frontier.exclusions}
    points = sorted({*law.frontier.candidates, *reasons}, key=lambda p: (p.num_params, p.run, p.compute))
    rows = [
        [
            "*" if p in frontier else "",
            p.run,
            size_label(p.num_params),
            f"{p.images:,}" if p.images else "",
            f"{p.compute:.3g}",
            _value(p),
            reasons.get(p, "on the frontier"),
        ]
        for p in points
    ]
    return Table(["", "run", "parameters", "images", "FLOPs", law.metric, "frontier"], rows, left=(0, 1, 6))


def slopes_table(law: Law) -> Table:
    """The log-log slope of each size's own learning curve."""
    rows = [
        [
            size_label(s.num_params),
            str(s.num_runs),
            str(s.num_points),
            f"{s.min_compute:.2g} .. {s.max_compute:.2g}",
            "" if s.slope is None else f"{s.slope:.4f}",
            "" if s.stderr is None else f"{s.stderr:.4f}",
            "yes" if s.num_params in law.frontier.sizes else "no",
        ]
        for s in law.size_slopes
    ]
    return Table(["size", "runs", "points", "FLOPs", "log-log slope", "SE", "reaches the frontier"], rows, left=(0,))


def fits_table(law: Law) -> Table:
    """Every form, fitted to the frontier: parameters with intervals, quality, certificate, status."""
    header = ["form", "points", "parameters [95 %]", "R² log", "AICc", "held-out", "starts", "cond.", "status"]
    return Table(header, [_fit_row(f) for f in law.fits], left=(0, 2, 8))


def predictions_table(law: Law) -> Table:
    """What each form that may be drawn says of more compute."""
    rows = [
        [
            form_label(f.fit.form),
            f"{p.factor:g}×",
            f"{p.compute:.3g}",
            f"{p.value:.4g}",
            "" if p.low is None or p.high is None else f"{p.low:.4g} .. {p.high:.4g}",
            status_label(f.status),
        ]
        for f in law.fits
        for p in (f.uncertainty.predictions if f.uncertainty is not None and f.fit.status == "ok" else ())
    ]
    return Table(["predicted by", "compute", "FLOPs", law.metric, "interval", "status"], rows, left=(0, 5))


def hold_out_table(law: Law) -> Table:
    """Held-out frontier points and what each form, fitted below the cut, says of them."""
    held = next((f.hold_out.points for f in law.fits if f.hold_out.points), ())
    forms = [f for f in law.fits if f.hold_out.points]
    rows = []
    for point in (h.point for h in held):
        row = [point.run, f"{point.compute:.3g}", _value(point)]
        for found in ({h.point: h for h in f.hold_out.points}.get(point) for f in forms):
            row += ["", ""] if found is None else [f"{found.predicted:.4g}", f"{found.relative_error:+.1%}"]
        rows.append(row)
    header = ["held-out point", "FLOPs", law.metric, *(x for f in forms for x in (form_label(f.fit.form), "error"))]
    return Table(header, rows, left=(0,))


def backtest_table(law: Law) -> Table:
    """Every form fitted below several cuts of compute, and its mean error at the frontier points above."""
    rows = [
        [
            f"{test.cut_compute:.3g}",
            form_label(test.form),
            str(test.num_fitted),
            str(len(test.points)) if test.points else "",
            "" if test.factor is None else f"{test.factor:.3g}×",
            "" if test.mean_relative_error is None else f"{test.mean_relative_error:.1%}",
            "" if test.no_change_error is None else f"{test.no_change_error:.1%}",
            test.message,
        ]
        for test in law.backtest
    ]
    header = ["cut (FLOPs)", "form", "fitted", "held out", "reach", "mean error", "if nothing changed", "remark"]
    return Table(header, rows, left=(1, 7))


def metrics_table(records: Sequence[EvalRecord]) -> str:
    """All that was measured of a run, or of several: one line a record, by images seen."""
    ordered = sorted(records, key=lambda r: (r.run, r.nimg, r.metric != "nll", r.metric, r.split))
    runs = len({record.run for record in records}) > 1
    rows = [
        [r.run if runs else "", f"{r.nimg:,}", metric_label(r.metric), r.split, _measured_value(r), f"{r.n:,}", _how(r)]
        for r in ordered
    ]
    header = ["run", "images", "metric", "split", "value", "N", "how"]
    return str(Table(header, rows, left=(0, 2, 3, 6)))


def _measured_value(record: EvalRecord) -> str:
    return f"{record.value:.5g}" if record.stderr is None else f"{record.value:.4f} ± {record.stderr:.4f}"


def _how(record: EvalRecord) -> str:
    """What a reader must know before comparing the value with another."""
    m, details = record.measured, record.details
    if record.metric == "nll":
        words = [f"{m.get('mode')}, {m.get('num_timesteps')} steps"]
        words += [f"chain {m['respacing']}"] if m.get("respacing") else []
        words += ["not clipped"] if not m.get("clip_denoised", True) else []
        words += [f"{details['num_images']:,} images"] if m.get("mode") == "exact" and "num_images" in details else []
    elif record.metric in ("accuracy", "top5_accuracy", "cross_entropy"):
        words = [f"noisy images, {m.get('t')} t of {m.get('num_timesteps')} {m.get('schedule')} steps"]
        words += [f"from {m['start']:g} to {m['end']:g}, tau {m['tau']:g}"] if "tau" in m else []
    elif record.metric == "memorisation":
        words = [f"{m.get('sampler')} {m.get('respacing')}, median of the nearest in pixels"]
    else:
        words = [f"{m.get('sampler')} {m.get('respacing')}, {m.get('feature_net')}", f"{m.get('num_reference'):,} real"]
        floor = details.get("floor")
        words += [] if floor is None else [f"real against real {floor:.4g}"]
    words += _sampling_words(m) if record.metric != "nll" else []
    words += [f"weights {m.get('weights')}"] if m.get("weights") != "ema" else []
    words += [reconstruction(record)] if record.reconstructed else []
    words += [f"ensemble below {m['ensemble_below']}"] if "ensemble_below" in m else []
    words += [f"seed {record.seeds[0]}"] if record.seeds and record.seeds[0] else []
    return "; ".join([*words, *details.get("notes", [])])


def reconstruction(record: EvalRecord) -> str:
    """How an average of the weights came about, where it was made after training."""
    found = record.reconstructed
    return "" if found is None else f"reconstructed, profile error {found['profile_error']:.2g}"


def _sampling_words(measured: Mapping[str, Any]) -> list[str]:
    """How samples were made, where it is not as usual."""
    words = [f"guidance {measured['guidance']:g}"] if measured.get("guidance", 1.0) != 1.0 else []
    if "classifier_scale" in measured:
        words.append(f"classifier {measured['classifier_sha256'][:8]}, scale {measured['classifier_scale']:g}")
    words += [f"eta {measured['eta']:g}"] if measured.get("eta") else []
    if "threshold" in measured:
        quantile = measured.get("threshold_quantile")
        words.append(f"threshold {measured['threshold']}" + (f" {quantile:g}" if quantile is not None else ""))
    if "corrector_steps" in measured:
        words.append(f"corrector steps {measured['corrector_steps']}, snr {measured['corrector_snr']:g}")
    return words


def _value(point: Point) -> str:
    return f"{point.value:.4g}" if point.stderr is None else f"{point.value:.3f} ± {point.stderr:.3f}"


def _fit_row(law_fit: LawFit) -> list[str]:
    fit, held = law_fit.fit, law_fit.hold_out
    doubt = f": {fit.message}" if fit.message else ""
    return [
        form_label(fit.form),
        str(fit.num_points),
        ", ".join(str(p) for p in parameters(law_fit)),
        _number(fit.r2_log, ".4f"),
        _number(fit.aicc, ".1f"),
        _number(held.mean_relative_error, ".1%"),
        _number(fit.share_of_starts, ".0%"),
        _number(fit.condition_number, ".3g"),
        f"{status_label(law_fit.status)}{doubt}",
    ]


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
