"""One law as a page of its own: what `python -m evaluation.scaling plot --out law.html` writes."""

from __future__ import annotations

from evaluation.report import html_page as page
from evaluation.report.law_chart import law_chart
from evaluation.report.style import law_title
from evaluation.report.tables import backtest_table, fits_table, hold_out_table, points_table, predictions_table
from evaluation.scaling.law import Law


def law_page(law: Law, *, title: str | None = None, paper: bool = False) -> str:
    """The law's figure, its numbers and its points, in one self-contained page."""
    title = law_title(law.metric, law.split) if title is None else title
    points = f"{len(law.frontier.candidates):,} points, {len(law.frontier.points):,} of them on the frontier of compute"
    markup = "".join(
        [
            page.paragraph(law.verdict, kind="verdict"),
            page.notes(law.notes[1:]),
            page.chart_figure(law_chart(law, title="", paper=paper)),
            page.table(fits_table(law)),
            page.table(predictions_table(law)),
            page.folded("Every point", page.table(points_table(law))),
            page.folded("Held-out points one by one", page.table(hold_out_table(law))),
            page.folded("Backtest: fitted below a cut, held against what came later", page.table(backtest_table(law))),
        ]
    )
    return page.page(title, f"{points}; compute: {law.flop_convention}", [("The law", markup)])
