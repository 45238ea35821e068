"""Tables for the terminal: points, frontier, slopes, fits with intervals, metrics. Plain strings."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.report.style import metric_label, size_label, split_label
from evaluation.scaling.law import Law, LawFit
from evaluation.scaling.points import Point
from trainer.tracking.records import EvalRecord

_INDENT = "  "


def law_report(law: Law) -> str:
    """Everything about one metric's law: points, slopes, fits, hold-out, and what it means."""
    where = f" on {split_label(law.split)}" if law.split else ""
    parts = [
        f"{metric_label(law.metric)}{where} against training compute ({law.flop_convention})",
        points_table(law),
        slopes_table(law),
        fits_table(law),
        *([hold_out_table(law)] if any(f.hold_out.points for f in law.fits) else []),
        "\n".join(f"{_INDENT}- {note}" for note in law.notes),
    ]
    return "\n\n".join(parts)


def points_table(law: Law) -> str:
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
    return table(["", "run", "parameters", "images", "FLOPs", law.metric, "frontier"], rows, left=(0, 1, 6))


def slopes_table(law: Law) -> str:
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
    return table(["size", "runs", "points", "FLOPs", "log-log slope", "SE", "reaches the frontier"], rows, left=(0,))


def fits_table(law: Law) -> str:
    """Both forms, fitted to the frontier: parameters with intervals, quality, certificate, status."""
    rows = [_fit_row(f) for f in law.fits]
    header = ["form", "points", "exponent b", "95 % (runs)", "constant c", "95 % (profile)", "R² log", "R²", "held-out"]
    return table([*header, "starts", "cond.", "status"], rows, left=(0, 11))


def hold_out_table(law: Law) -> str:
    """Held-out frontier points and what each form, fitted below the cut, says of them."""
    held = next(f.hold_out.points for f in law.fits if f.hold_out.points)
    predictions = {f.fit.form: {h.point: h for h in f.hold_out.points} for f in law.fits}
    rows = []
    for point in (h.point for h in held):
        row = [point.run, f"{point.compute:.3g}", _value(point)]
        for form in predictions:
            h = predictions[form].get(point)
            row += ["", ""] if h is None else [f"{h.predicted:.4g}", f"{h.relative_error:+.1%}"]
        rows.append(row)
    return table(["held-out point", "FLOPs", law.metric, "power", "error", "with constant", "error"], rows, left=(0,))


def metrics_table(records: Sequence[EvalRecord]) -> str:
    """All that was measured of a run, or of several: one line a record, by images seen."""
    ordered = sorted(records, key=lambda r: (r.run, r.nimg, r.metric != "nll", r.metric, r.split))
    runs = len({record.run for record in records}) > 1
    rows = [
        [r.run if runs else "", f"{r.nimg:,}", metric_label(r.metric), r.split, _measured_value(r), f"{r.n:,}", _how(r)]
        for r in ordered
    ]
    header = ["run", "images", "metric", "split", "value", "N", "how"]
    return table(header, rows, left=(0, 2, 3, 6))


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
    elif record.metric == "memorisation":
        words = [f"{m.get('sampler')} {m.get('respacing')}, median of the nearest in pixels"]
    else:
        words = [f"{m.get('sampler')} {m.get('respacing')}, {m.get('feature_net')}", f"{m.get('num_reference'):,} real"]
        words += [f"guidance {m['guidance']:g}"] if m.get("guidance", 1.0) != 1.0 else []
        floor = details.get("floor")
        words += [] if floor is None else [f"real against real {floor:.4g}"]
    words += [f"weights {m.get('weights')}"] if m.get("weights") != "ema" else []
    words += [f"ensemble below {m['ensemble_below']}"] if "ensemble_below" in m else []
    words += [f"seed {record.seeds[0]}"] if record.seeds and record.seeds[0] else []
    return "; ".join([*words, *details.get("notes", [])])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """A plain text table; columns are right-aligned except those in `left`, and empty columns are left out."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)] or list(range(len(header)))
    lines = [[row[i] for i in used] for row in (header, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(used))]

    def align(line: Sequence[str]) -> str:
        cells = zip(line, widths, used, strict=True)
        return _INDENT + "  ".join(c.ljust(w) if i in left else c.rjust(w) for c, w, i in cells)

    aligned = [align(line) for line in lines]
    rule = _INDENT + "  ".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in (aligned[0], rule, *aligned[1:]))


def _value(point: Point) -> str:
    return f"{point.value:.4g}" if point.stderr is None else f"{point.value:.3f} ± {point.stderr:.3f}"


def _fit_row(law_fit: LawFit) -> list[str]:
    fit, boot, held = law_fit.fit, law_fit.uncertainty, law_fit.hold_out
    name = {"power": "a C^-b", "power_constant": "c + a C^-b"}[fit.form]
    curve = fit.curve
    if curve is None or fit.r2_log is None or fit.r2_linear is None:
        return [name, str(fit.num_points), *[""] * 9, f"{fit.status}: {fit.message}"]
    interval = boot.intervals.get("exponent") if boot else None
    doubt = "?" if boot and boot.status != "ok" else ""
    return [
        name,
        str(fit.num_points),
        f"{curve.exponent:.4f} ± {fit.exponent_stderr or 0.0:.4f}",
        f"{interval[0]:.4f} .. {interval[1]:.4f}{doubt}" if interval else "",
        f"{curve.constant:.3f}" if fit.form == "power_constant" else "",
        f"{fit.constant_interval[0]:.3f} .. {fit.constant_interval[1]:.3f}" if fit.constant_interval else "",
        f"{fit.r2_log:.4f}",
        f"{fit.r2_linear:.4f}",
        "" if held.mean_relative_error is None else f"{held.mean_relative_error:.1%}",
        f"{fit.share_of_starts:.0%}" if fit.share_of_starts is not None else "",
        f"{fit.condition_number:.3g}" if fit.condition_number is not None else "",
        fit.status,
    ]
