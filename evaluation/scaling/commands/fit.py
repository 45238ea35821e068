"""`fit`: one form through all points, or through their frontier."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import chosen_points, print_json, since
from evaluation.scaling.commands.fit_options import (
    FORM_HELP,
    add_fit_options,
    chosen_frontier,
    form_and_constant,
    formula,
    is_learning_curve,
    settings_of,
    weights_text,
)
from evaluation.scaling.commands.options import positive
from evaluation.scaling.commands.size_data_text import fit_text
from evaluation.scaling.fitting.forms import FORMS, parameters
from evaluation.scaling.frontier import Frontier
from evaluation.scaling.one_fit import OneFit, fit_one
from evaluation.scaling.points import Point, columns, require_one_kind
from evaluation.scaling.sizes.robust import LOSSES, Loss
from evaluation.scaling.sizes.size_data import SizeDataFit, fit_size_data

HUBER_DELTA = 1e-3  # as published with size_data


def add(subparsers: Any) -> None:
    """Add the command."""
    command = subparsers.add_parser("fit", help="fit a law to all points", description="Fit a law to all points.")
    add_fit_options(command)
    command.add_argument("--form", choices=(*FORMS, "paper", "size_data"), default="power", help=FORM_HELP)
    command.add_argument("--loss", choices=LOSSES, help="of size_data, on log residuals (default: huber)")
    command.add_argument(
        "--delta", type=positive, metavar="D", help=f"of size_data's Huber loss (default: {HUBER_DELTA:g})"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit and print."""
    if arguments.form == "size_data":
        return _run_size_data(arguments)
    _refuse(arguments, "loss", "delta")
    form, constant = form_and_constant(arguments.form, arguments.constant)
    frontier = chosen_frontier(arguments)
    found = fit_one(
        frontier, form, select=arguments.frontier, constant=constant, settings=settings_of(arguments),
        learning_curve=is_learning_curve(arguments),
    )  # fmt: skip
    if arguments.constant == "fit":
        found = dataclasses.replace(found, fit=dataclasses.replace(found.fit, constant_interval=None))
    if arguments.json:
        print_json(fit_json(found, frontier, constant))
    else:
        print(_as_text(found, frontier, constant, paper=arguments.form == "paper"))
    return 0


def _refuse(arguments: argparse.Namespace, *names: str) -> None:
    """Raises UserError for an option that would change nothing."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"--{name} has no meaning for --form {arguments.form}: leave it out.")


def fit_json(found: OneFit, frontier: Frontier, constant: float | None) -> dict[str, object]:
    """The stable JSON of a fit; everything that was computed is in `fit` and `uncertainty`."""
    fit, uncertainty, first = found.fit, found.uncertainty, next(iter(frontier.points), None)
    return {
        "form": fit.form,
        "formula": formula(fit.form, constant),
        "metric": first.metric if first else None,
        "flop_convention": first.flop_convention if first else None,
        "status": found.status,
        "message": fit.message or (uncertainty.message if uncertainty else ""),
        "num_points": fit.num_points,
        "num_runs": len({p.run for p in frontier.points}),
        "weighted": columns(frontier.points).stderr is not None,
        "parameters": parameters(fit.curve) if fit.curve is not None else {},
        "intervals": uncertainty.intervals if uncertainty else {},
        "constant_profile": fit.constant_interval,
        "objective": fit.objective,
        "outliers": [dataclasses.asdict(frontier.points[i]) for i in fit.outliers],
        "fit": dataclasses.asdict(fit),
        "uncertainty": dataclasses.asdict(uncertainty) if uncertainty else None,
    }


def _run_size_data(arguments: argparse.Namespace) -> int:
    _refuse(arguments, "constant", "frontier")
    loss: Loss = arguments.loss or "huber"
    if loss != "huber" and arguments.delta is not None:
        raise UserError(f"--delta has no meaning for --loss {loss}: leave it out.")
    points = since(chosen_points(arguments), arguments.min_images or 0)
    require_one_kind(points)
    found = fit_size_data(
        points, loss=loss, delta=arguments.delta or HUBER_DELTA, num_rounds=arguments.rounds,
        confidence=arguments.confidence, seed=arguments.seed, run_spread=arguments.run_spread,
    )  # fmt: skip
    if arguments.json:
        print_json(_size_data_json(found, points))
    else:
        how = weights_text(points) if loss == "lsq" else "weights: equal relative errors"
        print(f"{fit_text(found)}\n{how}")
    return 0


def _size_data_json(found: SizeDataFit, points: Sequence[Point]) -> dict[str, object]:
    """The same keys as other forms have."""
    return {
        "form": "size_data",
        "formula": "E + A N^-alpha + B D^-beta",
        "metric": points[0].metric if points else None,
        "flop_convention": points[0].flop_convention if points else None,
        "status": found.status,
        "message": found.message,
        "num_points": found.num_points,
        "num_runs": found.num_runs,
        "weighted": found.loss == "lsq" and columns(points).stderr is not None,
        "parameters": found.curve.to_json() if found.curve is not None else {},
        "intervals": found.bootstrap.intervals if found.bootstrap is not None else {},
        "objective": found.objective,
        "outliers": [dataclasses.asdict(points[i]) for i in found.outliers],
        "fit": found.to_json(),
    }


def _as_text(found: OneFit, frontier: Frontier, constant: float | None, *, paper: bool) -> str:
    fit, uncertainty = found.fit, found.uncertainty
    status = f"{found.status}: {fit.message}" if fit.message else found.status
    lines = [
        f"form         {formula(fit.form, constant)}",
        f"status       {status}",
        f"points       {fit.num_points}",
    ]
    if fit.curve is None:
        return "\n".join(lines)
    values = parameters(fit.curve)
    if not paper:
        values = {name: value for name, value in values.items() if name not in ("k", "log10_k")}
    intervals = uncertainty.intervals if uncertainty else {}
    confidence = f"{uncertainty.confidence:.0%}" if uncertainty else ""
    for name, value in values.items():
        interval = f"   {confidence} {intervals[name][0]:.6g} .. {intervals[name][1]:.6g}" if name in intervals else ""
        if name == "constant" and fit.constant_interval is not None:
            interval += f"   profile {fit.constant_interval[0]:.6g} .. {fit.constant_interval[1]:.6g}"
        lines.append(f"{name.replace('_', ' '):<18} {value:.6g}{interval}")
    lines += [weights_text(frontier.points), *_certificate(found)]
    if uncertainty is not None:
        how = f"{uncertainty.method} {uncertainty.num_runs} runs, {uncertainty.num_valid} rounds"
        lines.append(
            f"intervals    {how}" + (f"; {uncertainty.status}: {uncertainty.message}" if uncertainty.message else "")
        )
    return "\n".join(lines)


def _certificate(found: OneFit) -> list[str]:
    fit = found.fit
    condition = "singular" if fit.condition_number is None else f"{fit.condition_number:.3g}"
    lines = [
        f"R2           {fit.r2_log:.6f} (log), {fit.r2_linear:.6f} (linear)",
        f"optimum      objective {fit.objective:.6g} (sum), {fit.share_of_starts:.0%} of starts agree, "
        f"condition number {condition}",
    ]
    if fit.aicc is not None and math.isfinite(fit.aicc):
        lines.append(f"AICc         {fit.aicc:.4g}")
    return lines
