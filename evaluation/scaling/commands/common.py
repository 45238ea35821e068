"""What all commands share: where the points come from, and how results are printed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from evaluation.scaling.law import plain_json
from evaluation.scaling.points import Point
from evaluation.scaling.sources import ColumnNames, Selection, read_points


def add_points(parser: argparse.ArgumentParser) -> None:
    """The options that say which points are meant."""
    parser.add_argument(
        "points",
        metavar="POINTS",
        help="a CSV with a header, a study's folder, or mlflow:EXPERIMENT (see docs/scaling.md)",
    )
    names = parser.add_argument_group("columns (of a CSV; metrics, parameters or tags of MLflow's runs)")
    names.add_argument("--x", default="compute", metavar="COLUMN", help="compute (default: compute)")
    names.add_argument("--y", default="value", metavar="COLUMN", help="values (default: value)")
    names.add_argument("--yerr", metavar="COLUMN", help="standard errors (default: stderr, if there is one)")
    names.add_argument("--group", metavar="COLUMN", help="the run, the unit of the bootstrap (default: run)")
    names.add_argument("--params", metavar="COLUMN", help="model size (default: num_params)")
    names.add_argument("--images", metavar="COLUMN", help="images or tokens seen (default: images)")
    chosen = parser.add_argument_group("which points")
    chosen.add_argument("--metric", help="only this metric, such as nll, where a file holds several")
    chosen.add_argument("--split", help="only this split, such as test")


def chosen_points(arguments: argparse.Namespace) -> list[Point]:
    """The points that the options name. Raises DataError."""
    names = ColumnNames(
        compute=arguments.x, value=arguments.y, stderr=arguments.yerr, run=arguments.group,
        num_params=arguments.params, images=arguments.images,
    )  # fmt: skip
    return read_points(arguments.points, names, Selection(arguments.metric, arguments.split))


def since(points: Sequence[Point], min_images: int) -> list[Point]:
    """The points of this many images and more, and those whose images are unknown."""
    return [p for p in points if p.images >= min_images or p.images == 0]


def print_json(value: Any) -> None:
    """Print a dataclass, or anything made of them, as JSON; what is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    print(json.dumps(plain_json(value), indent=2))
