"""`compare`: which form describes the points, and which predicts what it has not seen."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import print_json
from evaluation.scaling.commands.fit_options import (
    add_fit_options,
    chosen_frontier,
    form_and_constant,
    formula,
    is_learning_curve,
    settings_of,
    weights_text,
)
from evaluation.scaling.commands.plain_table import plain_table
from evaluation.scaling.fitting.compare import akaike_weights
from evaluation.scaling.fitting.forms import FORMS, FORMULAS
from evaluation.scaling.holdout import HoldOut, backtest, hold_out
from evaluation.scaling.one_fit import OneFit, fit_one


def add(subparsers: Any) -> None:
    """Add the command."""
    text = "compare the forms: AICc, error beyond a cut of compute, backtest"
    command = subparsers.add_parser("compare", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_fit_options(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit every form and print."""
    _, constant = form_and_constant("power", arguments.constant)
    if arguments.constant is not None and constant is None:
        raise UserError(f"--constant {arguments.constant} has no meaning for compare: one of the forms has a constant.")
    frontier, select, settings = chosen_frontier(arguments), arguments.frontier, settings_of(arguments)
    curve = is_learning_curve(arguments)
    found = [
        fit_one(frontier, form, select=select, constant=constant, settings=settings, learning_curve=curve)
        for form in FORMS
    ]
    if all(f.fit.curve is None for f in found):  # no law, so nothing that it predicts
        held = [HoldOut(f.fit.form, f.fit.status, f.fit.message, math.nan, 0) for f in found]
        tests: tuple[HoldOut, ...] = ()
    else:
        held = [hold_out(frontier, form, constant=constant, select=select) for form in FORMS]
        tests = backtest(frontier, constant=constant, select=select)
    weights = akaike_weights([f.fit for f in found])
    if arguments.json:
        forms = [
            {"form": f.fit.form, "formula": formula(f.fit.form, constant), "status": f.status,
             "message": f.fit.message, "aicc": f.fit.aicc, "akaike_weight": weights.get(f.fit.form),
             "held_out": dataclasses.asdict(h), "fit": dataclasses.asdict(f.fit)}
            for f, h in zip(found, held, strict=True)
        ]  # fmt: skip
        print_json({"forms": forms, "backtest": [dataclasses.asdict(test) for test in tests]})
    else:
        parts = [_forms_table(found, held, weights, constant), weights_text(frontier.points)]
        print("\n\n".join(parts + ([backtest_table(tests)] if tests else [])))
    return 0


def _forms_table(
    found: Sequence[OneFit], held: Sequence[HoldOut], weights: dict[str, float], constant: float | None
) -> str:
    rows = [
        [
            formula(f.fit.form, constant),
            "" if f.fit.aicc is None else f"{f.fit.aicc:.4g}",
            f"{weights[f.fit.form]:.3f}" if f.fit.form in weights else "",
            _percent(h.mean_relative_error),
            _percent(h.no_change_error),
            f"{f.status}: {f.fit.message}" if f.fit.message else f.status,
        ]
        for f, h in zip(found, held, strict=True)
    ]
    header = ["form", "AICc", "weight", "held-out error", "if nothing changed", "status"]
    return plain_table(header, rows, left=(0, 5))


def backtest_table(tests: Sequence[HoldOut]) -> str:
    """Fitted below a cut, predicted above it: the mean error by cut and form."""
    rows = []
    for cut in dict.fromkeys(test.cut_compute for test in tests):
        at = {test.form: test for test in tests if test.cut_compute == cut}
        one = next(iter(at.values()))
        factor = next((f"{t.factor:.3g}" for t in at.values() if t.factor is not None), "")
        unchanged = next((t.no_change_error for t in at.values() if t.no_change_error is not None), None)
        errors = [_percent(at[form].mean_relative_error) or at[form].status for form in FORMS]
        rows.append([f"{cut:.3g}", str(one.num_fitted), factor, *errors, _percent(unchanged)])
    header = ["fitted below", "points", "up to times", *(FORMULAS[form] for form in FORMS), "if nothing changed"]
    return plain_table(header, rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
