"""The options and the outcome that `fit`, `predict` and `compare` share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import add_points, chosen_points, since
from evaluation.scaling.commands.options import add_bootstrap, add_min_images, add_run_spread, share
from evaluation.scaling.fitting.forms import FORMULAS, Form
from evaluation.scaling.frontier import MIN_IMAGES, Frontier, all_points, find_frontier
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.points import Point, columns, require_one_kind
from evaluation.scaling.sources import MLFLOW

FORM_HELP = (
    "power: a x^-b; power_constant: c + a x^-b; paper: the same as c + (k x)^-b; broken: with a smooth break; "
    "size_data: E + A/N^alpha + B/D^beta"
)


def add_fit_options(command: argparse.ArgumentParser) -> None:
    """Which points, and how intervals are made."""
    add_points(command)
    command.add_argument(
        "--frontier", action="store_true", help="fit the compute frontier (lower envelope) instead of all points"
    )
    add_min_images(command, default=None, note=f" (default: {MIN_IMAGES:,} with --frontier, else none are left out)")
    command.add_argument(
        "--constant",
        metavar="V|fit|profile",
        help="a number V: y - V = a x^-b is fitted; fit: the constant is fitted; profile: with its profile interval",
    )
    add_bootstrap(command)
    command.add_argument("--confidence", type=share, default=0.95, help="of intervals (default: 0.95)")
    add_run_spread(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def chosen_frontier(arguments: argparse.Namespace) -> Frontier:
    """The points to fit. Raises DataError for points that must not share a fit."""
    points = chosen_points(arguments)
    require_one_kind(points)
    if arguments.frontier:
        return find_frontier(points, min_images=MIN_IMAGES if arguments.min_images is None else arguments.min_images)
    return all_points(since(points, arguments.min_images or 0))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """How the intervals are made."""
    return Settings(arguments.rounds, arguments.confidence, arguments.seed, arguments.run_spread)


def is_learning_curve(arguments: argparse.Namespace) -> bool:
    """Whether the points are to be fitted against the images (or steps) seen, where one size is enough."""
    place: str = arguments.points
    column: str = arguments.x
    return column == (arguments.images or "images") or (column == "step" and place.startswith(MLFLOW))


def form_and_constant(form: str, constant: str | None) -> tuple[Form, float | None]:
    """The form and its known constant, from --form and --constant.

    Raises:
        UserError: a constant that is neither a number nor a word, or that has no meaning for the form.
    """
    if form == "broken" and constant is not None:
        raise UserError(
            f"--constant {constant} has no meaning for --form broken, which fits its constant: leave it out."
        )
    chosen: Form = "power_constant" if form == "paper" or constant in ("fit", "profile") else form  # type: ignore[assignment]
    if constant is None or constant in ("fit", "profile"):
        return chosen, None
    try:
        value = float(constant)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--constant {constant!r} is neither a number nor 'fit' nor 'profile'.")
    return "power", value


def formula(form: Form, constant: float | None) -> str:
    """The form as a formula, with its known constant."""
    return FORMULAS[form] if constant is None or form != "power" else f"{constant:.15g} + {FORMULAS[form]}"


def weights_text(points: Sequence[Point]) -> str:
    """How the points are weighted, in a line."""
    if columns(points).stderr is not None:
        return "weights: standard errors"
    num_without = sum(not (p.stderr is not None and math.isfinite(p.stderr) and p.stderr > 0) for p in points)
    if all(p.stderr is None for p in points):
        return "weights: equal relative errors"
    return f"weights: none: {num_without} of {len(points)} points have no positive standard error"
