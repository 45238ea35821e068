"""How good the predicted x_0 is on the way to an image."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.report.chart import Axis, Chart, Panel, Series, log_axis
from evaluation.report.palette import category_colour
from evaluation.report.style import metric_label


def progressive_chart(times: Sequence[int], values: Sequence[float], *, metric: str, title: str) -> Chart:
    """A distance of the predicted x_0 against the reverse process's progress (Ho et al. 2020, figure 10).

    `times`: the t of each value, descending.
    """
    passed = [float(times[0] - t) for t in times]
    x = Axis(f"reverse process: {times[0]} - t", 0.0, passed[-1] or 1.0, log=False)
    line = Series(passed, values, category_colour(0), width=1.3, marker="dot")
    return Chart(f"Predicted x_0, {title}", ((Panel(x, log_axis(metric_label(metric), values), (line,)),),))
