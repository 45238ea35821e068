"""`fit`: one form through all points, or through their frontier."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from evaluation.scaling.commands.common import chosen_points, print_json
from evaluation.scaling.commands.fit_options import (
    FORM_HELP,
    add_fit_options,
    chosen_frontier,
    form_and_constant,
    settings_of,
)
from evaluation.scaling.commands.size_data_text import fit_text
from evaluation.scaling.fitting.forms import FORMS, FORMULAS, parameters
from evaluation.scaling.frontier import Frontier
from evaluation.scaling.one_fit import OneFit, fit_one
from evaluation.scaling.points import Point, require_one_kind
from evaluation.scaling.sizes.size_data import SizeDataFit, fit_size_data


def add(subparsers: Any) -> None:
    """Add the command."""
    command = subparsers.add_parser("fit", help="fit a law to all points", description="Fit a law to all points.")
    add_fit_options(command)
    command.add_argument("--form", choices=(*FORMS, "paper", "size_data"), default="power", help=FORM_HELP)
    command.add_argument(
        "--loss", choices=("huber", "lad", "lsq"), default="huber", help="of size_data, on log residuals"
    )
    command.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss (default: 1e-3)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit and print."""
    if arguments.form == "size_data":
        return _run_size_data(arguments)
    form, constant = form_and_constant(arguments.form, arguments.constant)
    frontier = chosen_frontier(arguments)
    found = fit_one(frontier, form, select=arguments.frontier, constant=constant, settings=settings_of(arguments))
    if arguments.constant == "fit":
        found = dataclasses.replace(found, fit=dataclasses.replace(found.fit, constant_interval=None))
    if arguments.x == "compute":
        found = _one_size(found, frontier)
    if arguments.json:
        print_json(fit_json(found, frontier))
    else:
        print(_as_text(found, paper=arguments.form == "paper"))
    return 0


def fit_json(found: OneFit, frontier: Frontier) -> dict[str, object]:
    """The stable JSON of a fit; everything that was computed is in `fit` and `uncertainty`."""
    fit, uncertainty, first = found.fit, found.uncertainty, next(iter(frontier.points), None)
    return {
        "form": fit.form,
        "formula": FORMULAS[fit.form],
        "metric": first.metric if first else None,
        "flop_convention": first.flop_convention if first else None,
        "status": found.status,
        "message": fit.message or (uncertainty.message if uncertainty else ""),
        "num_points": fit.num_points,
        "num_runs": len({p.run for p in frontier.points}),
        "parameters": parameters(fit.curve) if fit.curve is not None else {},
        "intervals": uncertainty.intervals if uncertainty else {},
        "constant_profile": fit.constant_interval,
        "objective": fit.objective,
        "outliers": [dataclasses.asdict(frontier.points[i]) for i in fit.outliers],
        "fit": dataclasses.asdict(fit),
        "uncertainty": dataclasses.asdict(uncertainty) if uncertainty else None,
    }


def _run_size_data(arguments: argparse.Namespace) -> int:
    points = chosen_points(arguments)
    require_one_kind(points)
    found = fit_size_data(
        points, loss=arguments.loss, delta=arguments.delta, num_rounds=arguments.rounds,
        confidence=arguments.confidence, seed=arguments.seed,
    )  # fmt: skip
    if arguments.json:
        print_json(_size_data_json(found, points))
    else:
        print(fit_text(found))
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
        "parameters": found.curve.to_json() if found.curve is not None else {},
        "intervals": found.bootstrap.intervals if found.bootstrap is not None else {},
        "objective": found.objective,
        "fit": dataclasses.asdict(found),
    }


def _one_size(found: OneFit, frontier: Frontier) -> OneFit:
    """Points of one known size are a learning curve, whatever form it follows."""
    if found.fit.status != "ok" or len(frontier.sizes) != 1 or 0 in frontier.sizes:
        return found
    message = f"all points are of one model size ({frontier.sizes[0]:,}): its learning curve, not a law over sizes."
    return dataclasses.replace(found, fit=dataclasses.replace(found.fit, status="one_size", message=message))


def _as_text(found: OneFit, *, paper: bool) -> str:
    fit, uncertainty = found.fit, found.uncertainty
    status = f"{found.status}: {fit.message}" if fit.message else found.status
    lines = [f"form         {FORMULAS[fit.form]}", f"status       {status}", f"points       {fit.num_points}"]
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
    lines += _certificate(found)
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
    if fit.aicc is not None:
        lines.append(f"AICc         {fit.aicc:.4g}")
    return lines
