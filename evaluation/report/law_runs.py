"""A study's fits as runs of a tracker, built as plain data: a run a fit, and one that carries the report's files.

Every fit's numbers have the same short names (`exponent`, `exponent_low`, `constant`, `r2_log`, ...), so that the run
table compares fits column by column. A fit that may be drawn has its curve under the name that the trials' own curves
have, so that one chart draws both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.report.palette import MUTED, form_colour
from evaluation.scaling.fitting.forms import FORMULAS, Curve
from evaluation.scaling.law import Law, LawFit, plain_json
from evaluation.scaling.sizes.size_data import SizeDataFit
from trainer.tracking.points import LawRun

CURVE_POINTS = 40  # drawn as dots: enough for a smooth bend, few enough to look unlike a trial
CURVE_BEYOND = 3.0  # the fitted curve goes this factor beyond the largest compute
_FORMULAS = {str(form): text for form, text in FORMULAS.items()} | {"size_data": "E + A N^-α + B D^-β"}


def law_runs(laws: Sequence[Law], *, study: str, size_data: Mapping[str, SizeDataFit] | None = None) -> list[LawRun]:
    """One run a fit, in the order of the laws, then the report's run.

    `size_data`: fits of L(N, D) by metric name, such as "nll/test".
    """
    fits = [_fit_run(law, law_fit, study) for law in laws for law_fit in law.fits]
    of_both = size_data or {}
    fits += [_size_data_run(law, of_both[curve_name(law)], study) for law in laws if curve_name(law) in of_both]
    return [*fits, _report_run(laws, study)]


def curve_name(law: Law) -> str:
    """The metric's name in a tracker: `nll/test`."""
    return f"{law.metric}/{law.split}" if law.split else law.metric


def fit_numbers(law_fit: LawFit) -> dict[str, float]:
    """Every finite number of a fit by a short name: parameters, intervals, certificate, errors, predictions."""
    fit, found, held = law_fit.fit, law_fit.uncertainty, law_fit.hold_out
    certificate = {field.name: getattr(fit, field.name) for field in dataclasses.fields(fit)}
    numbers = dict(
        _numbers(
            certificate
            | {"constant_interval": None, "constant_profile": fit.constant_interval, "outliers": len(fit.outliers)}
        )
    )
    if fit.curve is not None:
        numbers |= dict(_numbers(dataclasses.asdict(fit.curve)))
        numbers["log10_coefficient"] = fit.curve.log10_coefficient
    if found is not None:
        numbers |= dict(_numbers(found.intervals))
        for prediction in found.predictions:
            name = f"at_{prediction.factor:g}x_compute"
            numbers |= dict(_numbers({name: prediction.value, f"{name}_interval": (prediction.low, prediction.high)}))
    errors = {"held_out_error": held.mean_relative_error, "held_out_max_error": held.max_relative_error}
    return numbers | dict(_numbers(errors | {"no_change_error": held.no_change_error}))


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among the values; a pair is an interval: `x_interval` or `x` gives `x_low` and `x_high`."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value):
                yield name, float(value)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            stem = name.removesuffix("_interval")
            yield from _numbers({f"{stem}_low": value[0], f"{stem}_high": value[1]})


def _fit_run(law: Law, law_fit: LawFit, study: str) -> LawRun:
    fit = law_fit.fit
    curve = _curve(law, law_fit)
    intervals = law_fit.uncertainty.status if law_fit.uncertainty else "none"
    run = _bare_run(law, study, form=fit.form, status=law_fit.status, message=fit.message, intervals=intervals)
    note = f"{_equation(law_fit)}{run.tags['mlflow.note.content']}"
    best = law.best is not None and law.best.fit.form == fit.form
    return _addressed(
        dataclasses.replace(
            run,
            metrics=fit_numbers(law_fit),
            tags=run.tags
            | {"best": "yes" if best else "no", "drawn": "yes" if curve else "no", "mlflow.note.content": note},
            curves={curve_name(law): curve} if curve else {},
            documents={"fit.json": plain_json(dataclasses.asdict(law_fit))},
        )
    )


def _size_data_run(law: Law, fit: SizeDataFit, study: str) -> LawRun:
    """L(N, D) has no curve of compute alone, so it is a row of the table and not drawn."""
    intervals = fit.bootstrap.status if fit.bootstrap else "none"
    run = _bare_run(law, study, form="size_data", status=fit.status, message=fit.message, intervals=intervals)
    numbers = dict(_numbers({field.name: getattr(fit, field.name) for field in dataclasses.fields(fit)}))
    intervals_of = {
        f"{name}_interval": ends for name, ends in (fit.bootstrap.intervals if fit.bootstrap else {}).items()
    }
    for name, number in _numbers((fit.curve.to_json() if fit.curve else {}) | intervals_of):
        numbers[re.sub(r"^E(?=_|$)", "constant", name)] = number  # what it is called in the other forms
    document = {"fit.json": plain_json(fit.to_json())}
    return _addressed(dataclasses.replace(run, metrics=numbers, documents=document))


def _bare_run(law: Law, study: str, *, form: str, status: str, message: str, intervals: str) -> LawRun:
    """What every fit says of itself beside its numbers."""
    metric, formula = curve_name(law), _FORMULAS.get(form, form)
    notes = "\n".join(f"- {note}" for note in law.notes)
    reason = f"\n\n{status}: {message}" if message else ""
    return LawRun(
        id="",
        name=f"law {metric}: {formula}",
        study=study,
        time=0.0,
        params={
            "form": form, "formula": formula, "status": status, "intervals": intervals, "verdict": law.verdict,
            "flop_convention": law.flop_convention, "data": law.data, "measured": law.measured,
        },
        tags={
            "kind": "law", "metric": law.metric, "split": law.split, "form": form, "status": status, "size": "law",
            "best": "no", "drawn": "no", "mlflow.runColor": form_colour(form),
            "mlflow.note.content": f"`{formula}` fitted to **{metric}**.{reason}\n\n{notes}",
        },
    )  # fmt: skip


def _report_run(laws: Sequence[Law], study: str) -> LawRun:
    """The run that carries the files of the study's `law` folder. Its id, and so its address, stays the same."""
    verdicts = [f"**{curve_name(law)}**: {law.verdict}" for law in laws]
    note = "The study's report: `report.html` among the artifacts has figures, tables and fits.\n\n"
    tags = {"kind": "report", "size": "report", "mlflow.runColor": MUTED, "drawn": "no"}
    tags["mlflow.note.content"] = note + "\n\n".join(verdicts)
    return LawRun(f"{study}-report", "report", study, 0.0, tags=tags, carries_files=True)


def _equation(law_fit: LawFit) -> str:
    """The fitted law with its numbers, for a form that is written so."""
    curve = law_fit.fit.curve
    if not isinstance(curve, Curve):
        return ""
    constant = f"{curve.constant:.4g} + " if curve.constant else ""
    return f"**y = {constant}{10**curve.log10_coefficient:.4g} C^-{curve.exponent:.4g}**\n\n"


def _curve(law: Law, law_fit: LawFit) -> list[list[float]]:
    """A fit that may be drawn as [compute, value] pairs; else empty."""
    if law_fit.fit.curve is None or law_fit.fit.status != "ok" or not law.frontier.points:
        return []
    low, high = law.frontier.points[0].compute, law.frontier.points[-1].compute * CURVE_BEYOND
    grid = np.geomspace(low, high, CURVE_POINTS)
    return [[float(x), float(y)] for x, y in zip(grid, law_fit.fit.curve(grid), strict=True)]


def _addressed(run: LawRun) -> LawRun:
    """The run with an id made from all that it says: the same fit again is the same run, any other is another."""
    content = json.dumps(dataclasses.asdict(run), sort_keys=True)
    return dataclasses.replace(run, id=f"{run.study}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")
