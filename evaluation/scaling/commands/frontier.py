"""`frontier`: the points that nobody beats at their compute, and why the others are not among them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from evaluation.scaling.commands.common import add_points, chosen_points, print_json
from evaluation.scaling.commands.options import add_min_images
from evaluation.scaling.commands.plain_table import plain_table
from evaluation.scaling.frontier import Frontier, find_frontier
from evaluation.scaling.points import require_one_kind


def add(subparsers: Any) -> None:
    """Add the command."""
    text = "list the compute frontier (lower envelope), and why the other points are not on it"
    command = subparsers.add_parser("frontier", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_points(command)
    add_min_images(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Find and print."""
    points = chosen_points(arguments)
    require_one_kind(points)
    found = find_frontier(points, min_images=arguments.min_images)
    if arguments.json:
        print_json(dataclasses.asdict(found) | {"decades": found.decades})
    else:
        print(_as_text(found))
    return 0


def _as_text(found: Frontier) -> str:
    listed = [(p, "on the frontier") for p in found.points] + [(e.point, e.reason) for e in found.exclusions]
    rows = [
        [
            "*" if reason == "on the frontier" else "",
            p.run,
            f"{p.num_params:,}" if p.num_params else "",
            f"{p.compute:.4g}",
            f"{p.value:.5g}",
            "" if p.stderr is None else f"{p.stderr:.2g}",
            reason,
        ]
        for p, reason in sorted(listed, key=lambda item: (item[0].compute, item[0].run))
    ]
    table = plain_table(["", "run", "size", "compute", "value", "SE", "why"], rows, left=(0, 1, 6))
    sizes = len({p.num_params for p in found.admitted})
    return f"{table}\n\n  {len(found.points)} points, {len(found.sizes)} of {sizes} sizes, {found.decades:.2f} decades"
