"""A schedule as bars: which devices of which node each job held, from when to when; and as text.

The scheduler gives a job so many of a node's devices; which of them is drawn is decided here. Trials lie below,
evaluations above, and a job that finds no single gap is drawn in pieces.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.scheduling.jobs import Resources
from cluster.scheduling.simulate import Schedule, Span

MOST_LINES = 24  # of a text chart
_COLUMNS = 72
_IDLE, _EVALUATION, _UNNAMED = ".", ":", "#"
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_EPS = 1e-9


@dataclass(frozen=True)
class Bar:
    """A job on the devices `bottom` to `top` of its node; none (both 0) where it needs only CPUs beside GPUs."""

    span: Span
    bottom: float
    top: float

    @property
    def trial(self) -> str:
        """The trial's name, also of an evaluation."""
        return self.span.key.partition("/")[0]


def bars(schedule: Schedule, nodes: Mapping[str, Resources]) -> list[Bar]:
    """Every job on devices of its node, no two on one at a time."""
    by_node: dict[str, list[Span]] = {node: [] for node in nodes}
    for span in schedule.spans:
        by_node[span.node].append(span)
    return [bar for node, spans in by_node.items() for bar in _on_node(spans, nodes[node])]


def text_chart(schedule: Schedule, nodes: Mapping[str, Resources], names: Mapping[str, str]) -> str:
    """A line for devices that hold the same, or a node where those are too many; a letter a name.

    `names`: what each trial is called: its own name, or that of its size where trials are many. Empty where nodes are
    too many, too: then a picture says more.
    """
    if len(nodes) > MOST_LINES or schedule.makespan <= 0:
        return ""
    by_name = dict(zip(dict.fromkeys(names.values()), _LETTERS, strict=False))
    letters = {trial: by_name.get(name, _UNNAMED) for trial, name in names.items()}
    drawn = bars(schedule, nodes)
    by_node = {node: [bar for bar in drawn if bar.span.node == node] for node in nodes}
    lines = [line for node, has in nodes.items() for line in _device_lines(node, has, by_node[node], schedule, letters)]
    if len(lines) > MOST_LINES:
        lines = [(node, _row(mine, schedule.makespan, letters)) for node, mine in by_node.items()]
    width = max(len(name) for name, _ in lines)
    rows = [f"  {name:{width}}  {row}" for name, row in lines]
    return "\n".join([*rows, *_legend(by_name, width, drawn, _UNNAMED in letters.values())])


def _device_lines(
    node: str, has: Resources, mine: Sequence[Bar], schedule: Schedule, letters: Mapping[str, str]
) -> list[tuple[str, str]]:
    """(name, row) of a node's devices; neighbours that hold the same share one."""
    num = round(devices(has))
    rows = [
        _row([bar for bar in mine if bar.bottom < i + 0.5 < bar.top], schedule.makespan, letters) for i in range(num)
    ]
    kind = "GPU" if has.gpus else "CPU"
    lines: list[tuple[str, str]] = []
    for row, same in itertools.groupby(range(num), key=lambda i: rows[i]):
        first, *others = same
        lines.append((f"{node} {kind}s {first}-{others[-1]}" if others else f"{node} {kind} {first}", row))
    return lines


def devices(resources: Resources) -> float:
    """What a node's height is: GPUs, or CPUs where there are none."""
    return resources.gpus or resources.cpus


def _on_node(spans: Iterable[Span], node: Resources) -> list[Bar]:
    drawn: list[Bar] = []
    held: list[Bar] = []
    for span in sorted(spans, key=lambda span: (span.start, span.kind != "trial", span.key)):
        need = span.resources.gpus if node.gpus else span.resources.cpus
        held = [bar for bar in held if bar.span.end > span.start + _EPS]
        new = [Bar(span, *piece) for piece in _pieces(held, need, devices(node), from_top=span.kind != "trial")]
        held += new
        drawn += new or [Bar(span, 0.0, 0.0)]
    return drawn


def _pieces(held: Sequence[Bar], need: float, capacity: float, *, from_top: bool) -> list[tuple[float, float]]:
    """Where `need` devices are free: the first gap that is large enough, else the first ones together."""
    gaps, low = [], 0.0
    for bar in sorted(held, key=lambda bar: bar.bottom):
        gaps.append((low, bar.bottom))
        low = max(low, bar.top)
    gaps = [gap for gap in [*gaps, (low, capacity)] if gap[1] - gap[0] > _EPS]
    gaps = gaps[::-1] if from_top else gaps
    large = [gap for gap in gaps if gap[1] - gap[0] >= need - _EPS]
    pieces = []
    for bottom, top in large[:1] or gaps:
        size = min(need, top - bottom)
        if size > _EPS:
            pieces.append((top - size, top) if from_top else (bottom, bottom + size))
            need -= size
    return pieces


def _row(found: Sequence[Bar], makespan: float, letters: Mapping[str, str]) -> str:
    """What held the line longest in each column's time."""
    step, cells = makespan / _COLUMNS, []
    for column in range(_COLUMNS):
        start, end = column * step, (column + 1) * step
        shares: dict[str, float] = {_IDLE: 0.5 * step * 0.999}  # a column is busy where it is so for half of its time
        for bar in found:
            overlap = min(end, bar.span.end) - max(start, bar.span.start)
            if overlap > 0:
                sign = _EVALUATION if bar.span.kind == "evaluation" else letters[bar.trial]
                shares[sign] = shares.get(sign, 0.0) + overlap * max(1.0, bar.top - bar.bottom)
        cells.append(max(shares, key=lambda sign: shares[sign]))
    return "".join(cells)


def _legend(by_name: Mapping[str, str], width: int, drawn: Sequence[Bar], is_short: bool) -> list[str]:
    parts = [f"{letter} {name}" for name, letter in by_name.items()]
    parts += [f"{_UNNAMED} others"] if is_short else []
    parts += [f"{_EVALUATION} evaluations"] if any(bar.span.kind == "evaluation" for bar in drawn) else []
    lines: list[str] = []
    line = ""
    for part in parts:
        if line and len(line) + len(part) + 3 > _COLUMNS:
            lines, line = [*lines, line], ""
        line += ("   " if line else "") + part
    return [f"  {'':{width}}  {line}" for line in [*lines, line] if line]
