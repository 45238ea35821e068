"""The options and the outcome that `fit`, `predict` and `compare` share."""

from __future__ import annotations

import argparse
import math

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import add_points, chosen_points
from evaluation.scaling.fitting.forms import Form
from evaluation.scaling.frontier import Frontier, all_points, find_frontier
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.points import require_one_kind

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
    command.add_argument(
        "--constant",
        metavar="V|fit|profile",
        help="a number V: y - V = a x^-b is fitted; fit: the constant is fitted; profile: with its profile interval",
    )
    command.add_argument("--rounds", type=_count, default=1000, metavar="N", help="of the bootstrap over runs; 0: none")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    command.add_argument("--confidence", type=_share, default=0.95, help="of intervals (default: 0.95)")
    command.add_argument(
        "--run-spread",
        type=_positive,
        metavar="S",
        help="standard deviation of log value between runs that differ in seed alone, where it is known",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def chosen_frontier(arguments: argparse.Namespace) -> Frontier:
    """The points to fit. Raises DataError for points that must not share a fit."""
    points = chosen_points(arguments)
    require_one_kind(points)
    return find_frontier(points, min_images=0) if arguments.frontier else all_points(points)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """How the intervals are made."""
    return Settings(arguments.rounds, arguments.confidence, arguments.seed, arguments.run_spread)


def form_and_constant(form: str, constant: str | None) -> tuple[Form, float | None]:
    """The form and its known constant, from --form and --constant."""
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


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
