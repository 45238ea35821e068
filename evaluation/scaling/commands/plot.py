"""`plot`: the scaling curves, their frontier and the fitted laws as a picture, or as a page."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from evaluation.scaling.commands.common import add_points, chosen_points
from evaluation.scaling.commands.options import add_bootstrap, add_min_images, add_run_spread
from evaluation.scaling.fitting.forms import FORMS
from evaluation.scaling.frontier import MIN_IMAGES
from evaluation.scaling.intervals.bootstrap import Settings
from evaluation.scaling.law import Law, fit_law
from evaluation.scaling.paper import published
from evaluation.scaling.points import UNSTATED
from trainer.tracking.records import FLOP_CONVENTION

PICTURES, PAGE = (".png", ".svg", ".pdf"), ".html"


def add(subparsers: Any) -> None:
    """Add the command."""
    command = subparsers.add_parser(
        "plot",
        help="draw the curves, their frontier and the laws",
        description="Draw the curves, their frontier of compute, and the laws that are fitted to it.",
    )
    add_points(command)
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"{', '.join(PICTURES)}, or an interactive {PAGE}"
    )
    command.add_argument("--form", choices=FORMS, action="append", help="only this form (may be repeated)")
    command.add_argument("--paper", action="store_true", help="lay the published trend line of NLL or FID over it")
    command.add_argument("--title", help="default: the metric's name")
    add_min_images(command, note=f": they are drawn and not fitted (default: {MIN_IMAGES:,})")
    add_bootstrap(command)
    add_run_spread(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit, draw and say what was written."""
    _check_suffix(arguments.out)
    points = chosen_points(arguments)
    settings = Settings(num_rounds=arguments.rounds, seed=arguments.seed, run_spread=arguments.run_spread)
    law = fit_law(points, min_images=arguments.min_images, settings=settings)
    if arguments.paper:
        _check_paper(law)
    _draw(_only(law, arguments.form), arguments.out, title=arguments.title, paper=arguments.paper)
    print(f"wrote {arguments.out}: {law.verdict}")
    return 0


def _draw(law: Law, path: Path, *, title: str | None, paper: bool) -> None:
    if path.suffix == PAGE:
        from evaluation.report.law_page import law_page  # plotly, as matplotlib below, takes long to import

        write_atomic(path, law_page(law, title=title, paper=paper))
        return
    from evaluation.report.figures import draw_law, save_figure

    save_figure(draw_law(law, title=title, paper=paper), path)


def _only(law: Law, forms: Sequence[str] | None) -> Law:
    """The law with these forms; None: all."""
    return law if forms is None else dataclasses.replace(law, fits=tuple(f for f in law.fits if f.fit.form in forms))


def _check_suffix(path: Path) -> None:
    if path.suffix not in (*PICTURES, PAGE):
        raise UserError(f"--out {path}: the name must end in one of {', '.join((*PICTURES, PAGE))}.")


def _check_paper(law: Law) -> None:
    """Raises UserError where the published trend lines say nothing about these points."""
    if not published(law.metric):
        raise UserError(
            f"--paper: there are published trend lines of nll (bits/dim) and of fid (Inception-v3 features); "
            f"these points are {law.metric!r}, which is on another scale."
        )
    if law.flop_convention not in (FLOP_CONVENTION, UNSTATED):
        raise UserError(
            f"--paper: the points count compute as {law.flop_convention!r}; the line is known in "
            f"{FLOP_CONVENTION!r}. Convert the points first."
        )
