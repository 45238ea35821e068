"""`fit`: one form through all points."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from evaluation.scaling.bootstrap import Settings, fit_uncertainty
from evaluation.scaling.commands.common import add_points, chosen_points, print_json
from evaluation.scaling.fits import Fit, fit
from evaluation.scaling.forms import FORMS, Form
from evaluation.scaling.points import columns, require_one_kind
from evaluation.scaling.rounds import Question
from evaluation.scaling.uncertainty import Uncertainty


def add(subparsers: Any) -> None:
    """Add the command."""
    command = subparsers.add_parser("fit", help="fit a law to all points", description="Fit a law to all points.")
    add_points(command)
    command.add_argument("--form", choices=FORMS, default="power", help="power: a x^-b; power_constant: c + a x^-b")
    command.add_argument(
        "--constant",
        metavar="V|fit|profile",
        help="a number V: y - V = a x^-b is fitted; fit: the constant is fitted; profile: with its profile interval",
    )
    command.add_argument("--rounds", type=int, default=1000, metavar="N", help="of the bootstrap; 0: none")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit and print."""
    form, constant = _form(arguments.form, arguments.constant)
    points = chosen_points(arguments)
    require_one_kind(points)
    fitted = fit(columns(points), form, constant=constant)
    if arguments.constant == "fit":
        fitted = dataclasses.replace(fitted, constant_interval=None)
    uncertainty = None
    if fitted.curve is not None and arguments.rounds > 0:
        c = columns(points)
        reference, last = fitted.curve.reference_compute, float(c.compute.max())
        question = Question(form, constant or 0.0, reference, last, np.array([reference]))
        settings = Settings(num_rounds=arguments.rounds, seed=arguments.seed)
        uncertainty = fit_uncertainty(c, fitted, question, settings)
    if arguments.json:
        print_json(_as_json(fitted, uncertainty))
    else:
        print(_as_text(fitted, uncertainty))
    return 0


def _form(form: Form, constant: str | None) -> tuple[Form, float | None]:
    """The form and its known constant, from --form and --constant."""
    if constant is None:
        return form, None
    if constant in ("fit", "profile"):
        return "power_constant", None
    try:
        value = float(constant)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--constant {constant!r} is neither a number nor 'fit' nor 'profile'.")
    return "power", value


def _as_json(fitted: Fit, uncertainty: Uncertainty | None) -> dict[str, object]:
    value: dict[str, object] = {"fit": dataclasses.asdict(fitted)}
    if fitted.curve is not None:
        value["log10_coefficient"] = fitted.curve.log10_coefficient
    value["uncertainty"] = dataclasses.asdict(uncertainty) if uncertainty else None
    return value


def _as_text(fitted: Fit, uncertainty: Uncertainty | None) -> str:
    status = f"{fitted.status}: {fitted.message}" if fitted.message else fitted.status
    lines = [f"form       {fitted.form}", f"status     {status}", f"points     {fitted.num_points}"]
    curve = fitted.curve
    if curve is None:
        return "\n".join(lines)

    def interval(pair: tuple[float, float] | None, kind: str) -> str:
        return f"   {kind} {pair[0]:.6g} .. {pair[1]:.6g}" if pair else ""

    resampled = interval(uncertainty.intervals.get("exponent") if uncertainty else None, "bootstrap 95 %")
    lines.append(f"exponent   {curve.exponent:.6g}{resampled}")
    lines.append(f"constant   {curve.constant:.6g}{interval(fitted.constant_interval, 'profile 95 %')}")
    lines.append(f"log10(a)   {curve.log10_coefficient:.6g}")
    lines.append(f"R2         {fitted.r2_log:.6f} (log), {fitted.r2_linear:.6f} (linear)")
    lines.append(
        f"optimum    objective {fitted.objective:.6g}, {fitted.share_of_starts:.0%} of starts agree, "
        f"condition number {fitted.condition_number or math.nan:.3g}"
    )
    if uncertainty is not None and uncertainty.status != "ok":
        lines.append(f"intervals  {uncertainty.status}: {uncertainty.message}")
    return "\n".join(lines)
