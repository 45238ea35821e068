"""`predict`: what a law says of more compute than it has seen."""

from __future__ import annotations

import argparse
from typing import Any

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import print_json
from evaluation.scaling.commands.fit import fit_json
from evaluation.scaling.commands.fit_options import (
    FORM_HELP,
    add_fit_options,
    chosen_frontier,
    form_and_constant,
    is_learning_curve,
    settings_of,
)
from evaluation.scaling.commands.plain_table import plain_table
from evaluation.scaling.fitting.forms import FORMS
from evaluation.scaling.frontier import Frontier
from evaluation.scaling.one_fit import FACTORS, OneFit, fit_one


def add(subparsers: Any) -> None:
    """Add the command."""
    text = "predict the value at other computes, with intervals"
    command = subparsers.add_parser("predict", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_fit_options(command)
    command.add_argument("--form", choices=(*FORMS, "paper"), default="power_constant", help=FORM_HELP)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--at", metavar="COMPUTE,…", help="computes, in the unit of the points")
    where.add_argument("--factor", metavar="F,…", help="multiples of the largest compute (default: 10,100)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit, predict and print."""
    form, constant = form_and_constant(arguments.form, arguments.constant)
    frontier = chosen_frontier(arguments)
    largest = max((p.compute for p in frontier.points), default=float("nan"))
    factors = _numbers("--factor", arguments.factor) or list(FACTORS)
    if arguments.at:
        factors = [compute / largest for compute in _numbers("--at", arguments.at)]
    found = fit_one(
        frontier, form, select=arguments.frontier, constant=constant, settings=settings_of(arguments), factors=factors,
        learning_curve=is_learning_curve(arguments),
    )  # fmt: skip
    rows = predictions(found, largest, factors)
    if arguments.json:
        print_json(fit_json(found, frontier, constant) | {"predictions": rows})
    else:
        print(_as_text(found, frontier, rows))
    return 0


def predictions(found: OneFit, largest: float, factors: list[float]) -> list[dict[str, float | None]]:
    """Compute, factor beyond the largest compute, value and interval; none without a fit."""
    if found.fit.curve is None:
        return []
    if found.uncertainty is not None and found.uncertainty.predictions:
        return [
            {"compute": p.compute, "factor": p.factor, "value": p.value, "low": p.low, "high": p.high}
            for p in found.uncertainty.predictions
        ]
    values = found.fit.curve([largest * factor for factor in factors])
    return [
        {"compute": largest * factor, "factor": factor, "value": float(value), "low": None, "high": None}
        for factor, value in zip(factors, values, strict=True)
    ]


def _as_text(found: OneFit, frontier: Frontier, rows: list[dict[str, float | None]]) -> str:
    message = found.fit.message or (found.uncertainty.message if found.uncertainty else "")
    lines = [f"  status: {found.status}" + (f": {message}" if message else "")]
    if rows:
        header = ["compute", "times the largest", "value", "low", "high"]
        names = ("compute", "factor", "value", "low", "high")
        lines.insert(
            0, plain_table(header, [["" if row[n] is None else f"{row[n]:.6g}" for n in names] for row in rows])
        )
    return "\n\n".join(lines)


def _numbers(option: str, text: str | None) -> list[float]:
    if not text:
        return []
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = [float("nan")]
    if not all(0 < number < float("inf") for number in numbers):
        raise UserError(f"{option} {text!r}: give positive numbers, separated by commas.")
    return numbers
