"""`size POINTS --gpu-hours X …`: which size to train, on how many images, for a budget, and what to expect."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from evaluation.scaling.commands.common import add_points, chosen_points, print_json, since
from evaluation.scaling.commands.options import add_bootstrap, add_min_images, add_run_spread
from evaluation.scaling.commands.plain_table import plain_table
from evaluation.scaling.commands.size_data_text import fit_text
from evaluation.scaling.points import Point, require_one_kind
from evaluation.scaling.sizes.isoflop import IsoFlop, isoflop
from evaluation.scaling.sizes.optimum import Cost, Optimum, budget_flops, fit_cost, optimum
from evaluation.scaling.sizes.robust import LOSSES, Loss
from evaluation.scaling.sizes.size_data import SizeDataFit, fit_size_data

_SHOWN = 9  # of the sizes trained, those around the best


@dataclass(frozen=True)
class Answer:
    """All that is known about one budget."""

    compute: float
    fit: SizeDataFit
    cost: Cost
    optimum: Optimum | None  # None where there is no fit
    isoflop: IsoFlop

    def to_json(self) -> dict[str, Any]:
        return {
            "compute": self.compute,
            "fit": self.fit.to_json(),
            "cost": {"kappa": self.cost.kappa, **vars(self.cost)},
            "optimum": None if self.optimum is None else self.optimum.to_json(),
            "isoflop": {
                "status": self.isoflop.status,
                "message": self.isoflop.message,
                "num_params": _isoflop_at(self.isoflop.size_law, self.compute),
                "images": _isoflop_at(self.isoflop.images_law, self.compute),
            },
        }


def add(subparsers: Any) -> None:
    """Add the command's parser."""
    text = "which size to train, on how many images, for a budget of compute, by L(N, D) and by isoFLOP"
    command = subparsers.add_parser("size", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_points(command)
    budget = command.add_argument_group("the budget: --compute, or GPU hours at some speed")
    budget.add_argument("--compute", type=float, metavar="FLOPS", help="training FLOPs, by the points' convention")
    budget.add_argument("--gpu-hours", type=float, metavar="H")
    budget.add_argument(
        "--peak-flops", type=float, metavar="F", help="of one GPU a second, such as 989e12 (H100, bf16)"
    )
    budget.add_argument(
        "--utilization", type=float, metavar="U", help="share of the peak that training reaches, as 0.3"
    )
    command.add_argument("--loss", choices=LOSSES, default="huber", help="of the fit of L(N, D) (default: huber)")
    add_min_images(command, default=0, note=" (default: none are left out)")
    add_bootstrap(command)
    add_run_spread(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Raises DataError or UserError."""
    compute = _budget(arguments)
    points = since(chosen_points(arguments), arguments.min_images)
    if not points:
        raise UserError(f"--min-images {arguments.min_images} leaves out all points: take fewer.")
    require_one_kind(points)
    found = answer(
        points, compute, loss=arguments.loss, num_rounds=arguments.rounds, seed=arguments.seed,
        run_spread=arguments.run_spread,
    )  # fmt: skip
    if arguments.json:
        print_json(found.to_json())
    else:
        print(answer_text(found, points))
    return 0


def answer(
    points: Sequence[Point], compute: float, *, loss: Loss = "huber", num_rounds: int = 1000, seed: int = 0,
    run_spread: float | None = None,
) -> Answer:  # fmt: skip
    """The best size for a budget, by both ways. Raises DataError for points without sizes, images or compute."""
    cost = fit_cost(points)
    fit = fit_size_data(points, loss=loss, num_rounds=num_rounds, seed=seed, run_spread=run_spread)
    best = None if fit.curve is None else optimum(fit, points, compute, cost=cost)
    return Answer(compute, fit, cost, best, isoflop(points, num_rounds=num_rounds, seed=seed))


def answer_text(found: Answer, points: Sequence[Point]) -> str:
    """The answer as plain text: every doubt, then N*, D* and the value by both ways, the rungs, and the fit."""
    metric, best = points[0].metric, found.optimum
    parts = [f"budget     {found.compute:.4g} FLOPs ({found.cost.flop_convention} convention)"]
    parts += ["\n".join(f"  - {doubt}" for doubt in doubts)] if (doubts := _doubts(found)) else []
    if best is not None:
        parts += [_answers(found, best, metric), _rungs(best, metric)]
    elif found.isoflop.size_law is not None:
        parts.append(f"by isoFLOP: {_pair_text(_isoflop_at(found.isoflop.size_law, found.compute))} parameters")
    cost = found.cost
    parts.append(f"{fit_text(found.fit)}\ncost       {cost.kappa:.4g} N^{cost.gamma:.4f} FLOPs an image, "
                 f"within {cost.worst_error:.1%} of the points")  # fmt: skip
    return "\n\n".join(parts)


def _doubts(found: Answer) -> list[str]:
    """Why the answer may be wrong; they come before its numbers."""
    if found.optimum is not None:
        doubts = list(found.optimum.warnings)
    else:
        doubts = [f"there is no L(N, D) ({found.fit.status}): {found.fit.message}"]
    if found.isoflop.size_law is None:
        doubts.append(f"isoFLOP: {found.isoflop.message}")
    elif found.isoflop.interval_message:
        doubts.append(f"isoFLOP's intervals: {found.isoflop.interval_message}")
    return doubts


def _answers(found: Answer, best: Optimum, metric: str) -> str:
    size = _isoflop_at(found.isoflop.size_law, found.compute)
    images = _isoflop_at(found.isoflop.images_law, found.compute)
    rows = [
        ["size N*", f"{best.num_params:.4g}", _ends(best.num_params_interval), _pair_text(size)],
        ["images D*", f"{best.images:.4g}", _ends(best.images_interval), _pair_text(images)],
        [metric, f"{best.value:.5g}", _ends(best.value_interval), ""],
    ]
    return plain_table(["", "by L(N, D)", "95 %", "by isoFLOP"], rows, left=(0,))


def _rungs(best: Optimum, metric: str) -> str:
    rows = [
        [
            "*" if rung is best.best_rung else "",
            f"{rung.num_params:,}",
            f"{rung.images:.4g}",
            f"{rung.value:.5g}",
            _ends(rung.interval),
            "" if rung.share_best is None else f"{rung.share_best:.0%}",
        ]
        for rung in best.rungs
    ]
    centre = best.rungs.index(best.best_rung)
    first = max(0, min(centre - _SHOWN // 2, len(rows) - _SHOWN))
    shown = plain_table(
        ["", "size trained", "images", metric, "95 %", "best in rounds"], rows[first : first + _SHOWN], left=(0,)
    )
    return shown if len(rows) <= _SHOWN else f"{shown}\n  ({len(rows) - _SHOWN} more sizes)"


def _budget(arguments: argparse.Namespace) -> float:
    given = (arguments.gpu_hours, arguments.peak_flops, arguments.utilization)
    if arguments.compute is not None and given == (None, None, None):
        return float(arguments.compute)
    if arguments.compute is None and None not in given:
        return budget_flops(gpu_hours=given[0], peak_flops=given[1], utilization=given[2])
    raise UserError("say the budget as --compute FLOPS, or as --gpu-hours H --peak-flops F --utilization U.")


def _isoflop_at(law: Any, compute: float) -> dict[str, Any] | None:
    if law is None:
        return None
    return {"value": float(law(compute)), "interval": law.interval(compute)}


def _pair_text(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['value']:.4g}" + (f" ({_ends(found['interval'])})" if found["interval"] else "")


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"
