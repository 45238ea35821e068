"""Options that several commands share, checked where they are read."""

from __future__ import annotations

import argparse
import math

from evaluation.scaling.frontier import MIN_IMAGES

MIN_ROUNDS = 50


def add_bootstrap(command: argparse.ArgumentParser) -> None:
    """How many rounds, and from which seed."""
    command.add_argument(
        "--rounds", type=rounds, default=1000, metavar="N", help="of the bootstrap over runs (default: 1000); 0: none"
    )
    command.add_argument("--seed", type=whole, default=0, metavar="N", help="of the bootstrap")


def add_run_spread(command: argparse.ArgumentParser) -> None:
    """A spread between runs that is known from elsewhere."""
    command.add_argument(
        "--run-spread",
        type=positive,
        metavar="S",
        help="standard deviation of log value between runs that differ in seed alone, where it is known",
    )


def add_min_images(command: argparse.ArgumentParser, *, default: int | None = MIN_IMAGES, note: str = "") -> None:
    """Which early points are left out."""
    note = note or f" (default: {default:,})"
    command.add_argument(
        "--min-images", type=whole, default=default, metavar="N", help=f"leave out points before N images{note}"
    )


def rounds(text: str) -> int:
    """How many rounds; percentiles of a few mean nothing."""
    number = whole(text)
    if 0 < number < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(
            f"percentiles of {number} rounds mean nothing: take {MIN_ROUNDS} or more, or 0 for no intervals"
        )
    return number


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return number


def share(text: str) -> float:
    """A number between 0 and 1."""
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return number


def positive(text: str) -> float:
    """A positive number."""
    number = _number(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
