"""The end of a study: what was tried again and why, how long starts took, how well the cluster was used.

All of it comes from the journal, so it is of all lives of the driver. `overhead` says what the figures mean.
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

from cluster.files.folder import StudyFolder
from cluster.scheduling.jobs import Resources
from cluster.scheduling.simulate import Schedule, Span
from cluster.watching.history import CUT_OFF, WELL, History, Start, read_history
from cluster.watching.journal import EVENTS, read_events
from cluster.watching.overhead import bound, device_time
from cluster.watching.status import read_status
from cluster.words import count, duration, format_table
from data_pipeline.files import write_atomic

SUMMARY, FIGURE = "summary.txt", "schedule.png"
PROMISED_STARTUP = 10.0  # seconds
_MOST_ROWS = 40
_KINDS = {
    "lost": "node or worker lost", "stopped": "taken away", "out_of_memory": "out of memory", "no_space": "no space",
    CUT_OFF: "cut off with the driver", "user_error": "mistake",
}  # fmt: skip


def write_summary(folder: StudyFolder) -> str:
    """Write STUDY/summary.txt and STUDY/law/schedule.png, and add the text to the laws' report, which is to be there.

    Returns the text; empty where nothing ran.
    """
    last_seen = read_status(folder.path).get("driver", {}).get("now")
    history = read_history(read_events(folder.path / EVENTS), last_seen)
    if not history.starts:
        return ""
    text = summary_text(folder, history)
    write_atomic(folder.path / SUMMARY, text + "\n")
    report = folder.law / "report.txt"
    if report.exists():
        write_atomic(report, f"{report.read_text()}\n\n{text}\n")
    draw_history(folder, history, folder.law / FIGURE)
    return text


def summary_text(folder: StudyFolder, history: History) -> str:
    """A few lines; where something went wrong, a table too."""
    lines = [_what_happened(history), *_startup_line(history), *_use_lines(folder, history)]
    rows = [row for starts in history.by_key.values() if (row := _row(history, starts))]
    if rows:
        header = ("tried again or given up", "starts", "how they ended", "ran on", "as", "last trouble")
        left_out = [f"and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
        lines += ["", format_table(header, rows[:_MOST_ROWS]), *left_out]
    return "\n".join(lines)


def draw_history(folder: StudyFolder, history: History, path: Path) -> None:
    """The schedule that was, as a picture."""
    from cluster.planning.schedule_figure import Look, draw_schedule
    from evaluation.report.figures import save_figure

    study, nodes = folder.study, history.nodes
    if not any(start.per_node.gpus for start in history.starts):
        nodes = {node: Resources(has.cpus) for node, has in nodes.items()}
    several = len(study.seeds) > 1
    looks = {
        name: Look(t.label, f"{t.label} seed {t.seed}" if several else t.label, t.colour)
        for name, t in folder.trials.items()
    }
    for start in history.starts:  # of a trial that is no longer in the study file
        looks.setdefault(start.trial, Look("dropped", start.trial, "#8c8c8c"))
    title = f"{study.name}, as it ran: {_in_a_line(history)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_schedule(schedule(folder, history), nodes, looks, title=title), path)


def schedule(folder: StudyFolder, history: History) -> Schedule:
    """What ran, with the bound of these very jobs."""
    spans = [
        Span(start.key, start.kind, node, start.begin, start.end, start.per_node)
        for start in history.starts for node in start.nodes
    ]  # fmt: skip
    return Schedule(history.makespan, bound(folder, history), tuple(spans))


def _what_happened(history: History) -> str:
    lives = count(history.num_lives, "driver") + (f" ({history.num_killed} killed)" if history.num_killed else "")
    parts = [f"{lives}, {duration(history.makespan)} in all"]
    if history.nodes_lost:
        parts.append(f"{count(len(history.nodes_lost), 'node')} lost")
    kinds = Counter(_kind(start.status) for start in history.starts if start.status not in (*WELL, "diverged"))
    ended = ", ".join(f"{num} {kind}" for kind, num in kinds.most_common())
    parts.append(f"starts of jobs that did not end well: {ended}" if ended else "nothing had to be tried again")
    return "the run:     " + "; ".join(parts)


def _startup_line(history: History) -> list[str]:
    times = [s.startup for s in history.starts if s.kind == "trial" and s.startup is not None]
    if not times:
        return []
    late = sum(time > PROMISED_STARTUP for time in times)
    kept = f"all within {PROMISED_STARTUP:g} s" if not late else f"{late} of them over {PROMISED_STARTUP:g} s"
    spread = f"median {statistics.median(times):.1f} s, longest {max(times):.1f} s"
    return [f"start-up:    {spread} from the decision to the first step ({count(len(times), 'start')}, {kept})"]


def _use_lines(folder: StudyFolder, history: History) -> list[str]:
    time, capacity = device_time(folder, history), history.capacity
    held = sum((start.held * start.seconds for start in history.starts), Resources())
    unit, used, there = (
        ("GPUs", held.gpus, capacity.gpus) if held.gpus else ("CPUs", held.cpus, capacity.cpus)
    )  # fmt: skip
    lines = []
    if there and history.makespan:
        lowest = bound(folder, history)
        over = f", {history.makespan / lowest:.2f} x the time that no schedule goes below" if lowest else ""
        share = used / (there * history.makespan)
        number = f"{there:,.1f}".removesuffix(".0")
        lines.append(f"cluster:     {number} {unit} in the mean, {share:.0%} of their time held by jobs{over}")
    if time.own:
        repeated = f", repeated after troubles {time.repeated / time.own:.1%}" if time.repeated else ""
        lines.append(
            f"overhead:    start-up {time.startup / time.own:.1%} of the jobs' own time, all else that orchestration "
            f"adds {time.rest / time.own:.1%}{repeated}"
        )
    return lines


def _row(history: History, starts: list[Start]) -> tuple[str, ...] | None:
    """Of a job that did not end well at its first start."""
    bad = [start for start in starts if start.status not in WELL]
    if not bad:
        return None
    key = starts[0].key
    kinds = Counter(_kind(start.status) for start in bad)
    how = ", ".join(f"{num} {kind}" for kind, num in kinds.items())
    given_up = [failure for failure in history.failures if failure["key"] == key]
    if starts[-1].status != "done":
        how += f"; {given_up[-1]['state']}" if given_up else "; not finished"
    nodes = dict.fromkeys(node for start in starts for node in start.nodes)
    layouts = dict.fromkeys(start.layout for start in starts)
    why = next((start.message for start in reversed(bad) if start.message), "")
    return key, str(len(starts)), how, _few(list(nodes)), " -> ".join(layouts), " ".join(why.split())[:80]


def _in_a_line(history: History) -> str:
    bad = sum(start.status not in WELL for start in history.starts)
    again = f", {count(bad, 'start')} cut short" if bad else ""
    return f"{duration(history.makespan)}, {count(history.num_lives, 'driver')}{again}"


def _kind(status: str) -> str:
    return _KINDS.get(status, status)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
