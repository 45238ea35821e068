"""`python -m evaluation.scaling fit POINTS.csv`: fit a scaling law to the points of any CSV."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError, run_cli
from evaluation.scaling.bootstrap import Bootstrap, bootstrap
from evaluation.scaling.fits import FORMS, Fit, Form, fit
from evaluation.scaling.law import plain_json
from evaluation.scaling.points import columns, read_csv, require_one_kind


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m evaluation.scaling", description=__doc__)
    command = root.add_subparsers(dest="command", required=True).add_parser(
        "fit", help="fit a power law to all points of a CSV", description="Fit a power law to all points of a CSV."
    )
    command.add_argument("points", type=Path, metavar="POINTS.csv", help="a CSV with a header")
    command.add_argument("--x", default="compute", metavar="COLUMN", help="column of compute (default: compute)")
    command.add_argument("--y", default="value", metavar="COLUMN", help="column of values (default: value)")
    command.add_argument("--yerr", metavar="COLUMN", help="column of standard errors (default: stderr)")
    command.add_argument("--group", metavar="COLUMN", help="column that names the run, the unit of the bootstrap")
    command.add_argument("--form", choices=FORMS, default="power", help="power: a x^-b; power_constant: c + a x^-b")
    command.add_argument(
        "--constant",
        metavar="V|fit|profile",
        help="a number V: y - V = a x^-b is fitted; fit: the constant is fitted; profile: with its profile interval",
    )
    command.add_argument("--rounds", type=int, default=1000, metavar="N", help="of the bootstrap; 0: none")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    command.add_argument("--json", action="store_true", help="print JSON")
    return root


def main() -> int:
    """Run the command."""
    arguments = parser().parse_args()
    form, constant = _form(arguments.form, arguments.constant)
    points = read_csv(
        arguments.points, compute=arguments.x, value=arguments.y, stderr=arguments.yerr, run=arguments.group
    )
    require_one_kind(points)
    fitted = fit(columns(points), form, constant=constant)
    if arguments.constant == "fit":
        fitted = dataclasses.replace(fitted, constant_interval=None)
    intervals = None
    if fitted.curve is not None and arguments.rounds > 0:
        intervals = bootstrap(
            points,
            form,
            reference_compute=fitted.curve.reference_compute,
            band_compute=np.array([fitted.curve.reference_compute]),
            constant=constant or 0.0,
            frontier=False,
            num_rounds=arguments.rounds,
            seed=arguments.seed,
        )
    print(json.dumps(_as_json(fitted, intervals), indent=2) if arguments.json else _as_text(fitted, intervals))
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


def _as_json(fitted: Fit, intervals: Bootstrap | None) -> dict[str, object]:
    value: dict[str, object] = {"fit": plain_json(dataclasses.asdict(fitted))}
    if fitted.curve is not None:
        value["log10_coefficient"] = fitted.curve.log10_coefficient
    value["bootstrap"] = plain_json(dataclasses.asdict(intervals)) if intervals else None
    return value


def _as_text(fitted: Fit, intervals: Bootstrap | None) -> str:
    status = f"{fitted.status}: {fitted.message}" if fitted.message else fitted.status
    lines = [f"form       {fitted.form}", f"status     {status}", f"points     {fitted.num_points}"]
    curve = fitted.curve
    if curve is None:
        return "\n".join(lines)

    def interval(pair: tuple[float, float] | None, kind: str) -> str:
        return f"   {kind} {pair[0]:.6g} .. {pair[1]:.6g}" if pair else ""

    resampled = interval(intervals.exponent if intervals else None, "bootstrap 95 %")
    lines.append(f"exponent   {curve.exponent:.6g}{resampled}")
    lines.append(f"constant   {curve.constant:.6g}{interval(fitted.constant_interval, 'profile 95 %')}")
    lines.append(f"log10(a)   {curve.log10_coefficient:.6g}")
    lines.append(f"R2         {fitted.r2_log:.6f} (log), {fitted.r2_linear:.6f} (linear)")
    lines.append(
        f"optimum    objective {fitted.objective:.6g}, {fitted.share_of_starts:.0%} of starts agree, "
        f"condition number {fitted.condition_number or math.nan:.3g}"
    )
    if intervals is not None and intervals.status != "ok":
        lines.append(f"bootstrap  {intervals.status}: {intervals.message}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
