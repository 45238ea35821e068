"""`isoflop POINTS`: the best size at equal training compute, and how it grows with compute."""

from __future__ import annotations

import argparse
from typing import Any

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import add_points, chosen_points, print_json
from evaluation.scaling.commands.options import add_bootstrap
from evaluation.scaling.commands.plain_table import plain_table
from evaluation.scaling.points import require_one_kind
from evaluation.scaling.sizes.isoflop import IsoFlop, OptimumLaw, Slice, isoflop


def add(subparsers: Any) -> None:
    """Add the command's parser."""
    text = "parabolas in log size at equal training compute, and power laws through their minima"
    command = subparsers.add_parser("isoflop", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_points(command)
    command.add_argument(
        "--budgets", metavar="FLOPS,…", help="the computes (default: those that points share, else where sizes overlap)"
    )
    command.add_argument(
        "--num-budgets", type=int, default=8, metavar="N", help="slices of learning curves (default: 8)"
    )
    add_bootstrap(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Raises DataError or UserError."""
    if arguments.num_budgets < 1:
        raise UserError(f"--num-budgets {arguments.num_budgets} is not a positive number.")
    points = chosen_points(arguments)
    require_one_kind(points)
    result = isoflop(
        points,
        budgets=_budgets(arguments.budgets),
        num_budgets=arguments.num_budgets,
        num_rounds=arguments.rounds,
        seed=arguments.seed,
    )
    if arguments.json:
        print_json(result.to_json())
    else:
        print(isoflop_text(result))
    return 0


def isoflop_text(result: IsoFlop) -> str:
    """The slices and the laws as plain text."""
    rows = [_row(s) for s in result.slices]
    header = ["FLOPs", "sizes fitted", "best size N*", "95 %", "images D*", "value", "SE", "status"]
    parts = [plain_table(header, rows, left=(7,))] if rows else []
    if result.size_law is not None and result.images_law is not None:
        parts.append("\n".join([_law("N*", result.size_law), _law("D*", result.images_law)]))
    parts += [f"{result.status}: {result.message}"] if result.message else []
    parts += [f"intervals: {result.interval_message}"] if result.interval_message else []
    return "\n\n".join(parts)


def _budgets(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        budgets = [float(word) for word in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget < float("inf") for budget in budgets):
        raise UserError(f"--budgets {text!r} is not a list of positive numbers such as 1e18,3e18.")
    return budgets


def _row(s: Slice) -> list[str]:
    interval = "" if s.size_interval is None else f"{s.size_interval[0]:.3g} .. {s.size_interval[1]:.3g}"
    return [
        f"{s.budget:.3g}",
        str(s.num_fitted_sizes),
        "" if s.optimal_size is None else f"{s.optimal_size:.4g}",
        interval,
        "" if s.optimal_images is None else f"{s.optimal_images:.4g}",
        "" if s.optimal_value is None else f"{s.optimal_value:.5g}",
        "" if s.value_stderr is None else f"{s.value_stderr:.2g}",
        f"{s.status}: {s.message}" if s.message else s.status,
    ]


def _law(name: str, law: OptimumLaw) -> str:
    interval = law.exponent_interval
    ends = "" if interval is None else f"   95 % of rounds {interval[0]:.4f} .. {interval[1]:.4f}"
    return f"  {name} = {law.at_reference:.4g} (C / {law.reference_compute:.4g})^{law.exponent:.4f}{ends}"
