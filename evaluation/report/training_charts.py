"""Charts of the training itself: the loss by quartile of the timestep, and the speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evaluation.report.chart import Chart, Panel, Series, joined, log_axis
from evaluation.report.palette import SizeGroup, size_groups
from evaluation.report.run_files import RunRecords
from evaluation.report.style import size_label

QUARTILES = ("first quarter of t (least noise)", "second quarter", "third quarter", "last quarter (most noise)")
_LOSSES = {"mse": "noise prediction, MSE", "vb": "bound T·L_t, bits/dim"}
_SPEEDS = {"speed/img_per_second": "images per second", "speed/mfu": "share of the device's peak (MFU)"}


def quartiles_chart(runs: Sequence[RunRecords], *, title: str = "Training loss by timestep") -> Chart | None:
    """The loss within each quarter of the timesteps against images seen, a row a term of the objective."""
    terms = [term for term in _LOSSES if any(run.curve(f"train/{term}_q0") for run in runs)]
    if not terms:
        return None
    groups = size_groups([run.run.num_params for run in runs])
    rows = tuple(
        tuple(_quartile_panel(runs, groups, term, q, last=term == terms[-1]) for q in range(4)) for term in terms
    )
    return Chart(title, rows, heights=(1.0,) * len(terms), size=(12.5, 2.9 * len(terms) + 0.5))


def speed_chart(runs: Sequence[RunRecords], *, title: str = "Speed of training") -> Chart | None:
    """Each run's median images per second and MFU against its size."""
    names = [name for name in _SPEEDS if any(run.median(name) for run in runs)]
    sizes = [float(run.run.num_params) for run in runs if run.run.num_params]
    if not names or not sizes:
        return None
    x = log_axis("parameters", sizes, ticks="power", room=0.15)
    groups = size_groups([run.run.num_params for run in runs])
    panels = []
    for name in names:
        found = [(run, v) for run in runs if (v := run.median(name)) is not None]
        y = log_axis(_SPEEDS[name], [v for _, v in found], room=0.15)
        panels.append(Panel(x, y, tuple(_speeds(found, groups, _SPEEDS[name]))))
    return Chart(title, (tuple(panels),), size=(10.0, 3.4))


def _quartile_panel(
    runs: Sequence[RunRecords], groups: Sequence[SizeGroup], term: str, quartile: int, *, last: bool
) -> Panel:
    name = f"train/{term}_q{quartile}"
    curves = {run.run.name: run.curve(name) for run in runs}
    images = [x for curve in curves.values() for x, _ in curve]
    losses = [y for curve in curves.values() for _, y in curve]
    series = []
    for group in groups:
        chosen = [run for run in runs if run.run.num_params in group.sizes and curves[run.run.name]]
        x, y = joined([curves[run.run.name] for run in chosen])
        hover = [words for run in chosen for words in (*_loss_hover(run, curves[run.run.name]), ())]
        if chosen:
            series.append(
                Series(x, y, group.colour, group.label, "sizes", group.label, width=0.9, opacity=0.8, hover=hover)
            )
    axis_label = _LOSSES[term] if quartile == 0 else " "
    x_axis = log_axis("images seen" if last else "", images, ticks="power", room=0.02)
    return Panel(x_axis, log_axis(axis_label, losses), tuple(series), title=QUARTILES[quartile])


def _loss_hover(run: RunRecords, curve: Sequence[tuple[float, float]]) -> Iterator[tuple[str, ...]]:
    for x, y in curve:
        yield (f"{run.run.name}, seed {run.run.seed}", f"{y:.4g} after {x:,.0f} images")


def _speeds(found: Sequence[tuple[RunRecords, float]], groups: Sequence[SizeGroup], label: str) -> Iterator[Series]:
    for group in groups:
        chosen = [(run, v) for run, v in found if run.run.num_params in group.sizes]
        if chosen:
            hover = [(f"{r.run.name}, {size_label(r.run.num_params)}", f"{v:.4g} {label}") for r, v in chosen]
            yield Series(
                [float(run.run.num_params) for run, _ in chosen], [v for _, v in chosen], group.colour, group.label,
                "sizes", group.label, marker="dot", size=6, opacity=0.8, hover=hover,
            )  # fmt: skip
