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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.report.palette import MUTED, form_colour
from evaluation.scaling.law import Law, LawFit, plain_json
from trainer.tracking.points import LawRun

CURVE_POINTS = 40  # drawn as dots: enough for a smooth bend, few enough to look unlike a trial
CURVE_BEYOND = 3.0  # the fitted curve goes this factor beyond the largest compute
FORMULAS = {"power": "a C^-b", "power_constant": "c + a C^-b", "broken": "broken power law"}


def law_runs(laws: Sequence[Law], *, study: str) -> list[LawRun]:
    """One run a fit, in the order of the laws, then the report's run."""
    fits = [_fit_run(law, law_fit, study) for law in laws for law_fit in law.fits]
    return [*fits, _report_run(laws, study)]


def curve_name(law: Law) -> str:
    """The metric's name in a tracker: `nll/test`."""
    return f"{law.metric}/{law.split}" if law.split else law.metric


def fit_numbers(law_fit: LawFit) -> dict[str, float]:
    """Every finite number of a fit by a short name: parameters, intervals, certificate, errors, predictions."""
    fit, found, held = law_fit.fit, law_fit.uncertainty, law_fit.hold_out
    certificate = {field.name: getattr(fit, field.name) for field in dataclasses.fields(fit)}
    numbers = dict(_numbers(certificate | {"constant_interval": None, "constant_profile": fit.constant_interval}))
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
    fit, metric = law_fit.fit, curve_name(law)
    formula = FORMULAS.get(fit.form, fit.form)
    best = law.best is not None and law.best.fit.form == fit.form
    curve = _curve(law, law_fit)
    message = f"\n\n{fit.status}: {fit.message}" if fit.message else ""
    return _addressed(
        LawRun(
            id="",
            name=f"law {metric}: {formula}",
            study=study,
            time=0.0,
            metrics=fit_numbers(law_fit),
            params={
                "form": fit.form, "formula": formula, "status": fit.status, "flop_convention": law.flop_convention,
                "data": law.data, "measured": law.measured, "verdict": law.verdict,
                "intervals": law_fit.uncertainty.status if law_fit.uncertainty else "none",
            },
            tags={
                "kind": "law", "metric": law.metric, "split": law.split, "form": fit.form, "status": fit.status,
                "size": "law", "best": "yes" if best else "no", "drawn": "yes" if curve else "no",
                "mlflow.runColor": form_colour(fit.form),
                "mlflow.note.content": f"`{formula}` fitted to **{metric}** against training compute.{message}\n\n"
                + "\n".join(f"- {note}" for note in law.notes),
            },
            curves={metric: curve} if curve else {},
            documents={"fit.json": plain_json(dataclasses.asdict(law_fit))},
        )
    )  # fmt: skip


def _report_run(laws: Sequence[Law], study: str) -> LawRun:
    """The run that carries the files of the study's `law` folder. Its id, and so its address, stays the same."""
    verdicts = [f"**{curve_name(law)}**: {law.verdict}" for law in laws]
    note = "The study's report: `report.html` among the artifacts has figures, tables and fits.\n\n"
    tags = {"kind": "report", "size": "report", "mlflow.runColor": MUTED, "drawn": "no"}
    tags["mlflow.note.content"] = note + "\n\n".join(verdicts)
    return LawRun(f"{study}-report", "report", study, 0.0, tags=tags, carries_files=True)


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
