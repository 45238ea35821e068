"""Learning curves: value against images seen."""

from __future__ import annotations

from evaluation.report.chart import Chart, Panel, log_axis
from evaluation.report.palette import size_groups
from evaluation.report.run_series import drawn_points, run_series
from evaluation.report.style import law_title
from evaluation.scaling.law import Law


def curves_chart(law: Law, *, title: str | None = None) -> Chart | None:
    """Every run's value against the images it has seen, by size; None where the points do not say how many."""
    points = drawn_points(law)
    if not points or any(p.images <= 0 for p in points):
        return None
    name = law_title(law.metric, law.split)
    values = [v for p in points for v in (p.value, p.value + (p.stderr or 0.0))]
    x = log_axis("images seen in training", [float(p.images) for p in points], ticks="power")
    series = tuple(run_series(law, size_groups([p.num_params for p in points]), "images"))
    return Chart(f"Learning curves: {name}" if title is None else title, ((Panel(x, log_axis(name, values), series),),))
