"""What `status` shows: a study as its files tell it, whoever drives it or nobody, wherever its storage is seen."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.files.folder import StudyFolder
from cluster.scheduling.jobs import Resources
from cluster.watching.eta import Progress, seconds_left
from cluster.watching.journal import EVENTS, Event, last_events, read_events
from cluster.watching.status import images, read_status, trial_state
from cluster.words import count, duration, format_table
from evaluation.quality import record_name
from trainer.tracking.records import EvalRecord

_STALE_SECONDS = 20.0  # beyond the time between two writes, of a driver on another host
_WATCH_SECONDS, _WATCH_COST = 2.0, 5.0
_SHOWN_EVENTS = 6
_FINAL = ("complete", "cancelled", "diverged")
# Where not all trials can be shown, the first of these are.
_INTEREST = ("no space", "retrying", "failed", "running", "starting", "diverged", "stopped", "cancelled", "waiting")


@dataclass(frozen=True)
class _Row:
    """A trial."""

    name: str
    state: str
    progress: Progress
    cells: tuple[str, ...]


def status_table(folder: StudyFolder, *, max_lines: int | None = None) -> str:
    """The study's head, a line a trial, what is amiss, and what happened last.

    `max_lines`: where the trials are more, only the most interesting ones have a line.
    """
    return _Status(folder).text(max_lines)


def watch(folder: StudyFolder) -> None:
    """Show the table again and again, until the study is complete or Ctrl-C."""
    while True:
        began = time.monotonic()
        seen = _Status(folder)
        if sys.stdout.isatty():
            size = shutil.get_terminal_size()
            lines = [line[: size.columns - 1] for line in seen.text(size.lines - 1).splitlines()]
            print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        else:
            print(seen.text(None) + "\n", flush=True)
        if seen.is_over:
            return
        time.sleep(max(_WATCH_SECONDS, _WATCH_COST * (time.monotonic() - began)))


def is_driven(folder: StudyFolder) -> bool:
    """Does somebody drive the study, here or on another host?"""
    return _driver(folder, read_status(folder.path), time.time()) is not None


class _Status:
    """One look at a study's files."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder, self.now = folder, time.time()
        self.said = read_status(folder.path)
        self.driver = _driver(folder, self.said, self.now)
        self.tells = self.driver is not None and _is_of(self.said, self.driver)
        self.metrics = _metrics(folder)
        self.rows = [self._row(name) for name in folder.trials]

    @property
    def is_over(self) -> bool:
        """Is nothing left to be trained or evaluated?"""
        return self.driver is None and all(row.state in _FINAL and not row.progress.missing for row in self.rows)

    def text(self, max_lines: int | None) -> str:
        header = ("trial", "size", "state", "images", "", "img/s", "ETA", "evaluated", *self.metrics, "node", "retries")
        head, foot = self._head(), [*_block(self._amiss()), *_block(self._events())]
        rows, left_out = self.rows, ""
        if max_lines is not None and len(rows) > (room := max(1, max_lines - len(head) - len(foot) - 4)):
            rows = sorted(rows, key=_interest)[:room]
            left_out = "and " + _counts(row for row in self.rows if row not in rows)
        table = format_table(header, [row.cells for row in rows])
        return "\n".join([*head, "", table, *([left_out] if left_out else []), *foot])

    # ---- the head -----------------------------------------------------------------------------------------------

    def _head(self) -> list[str]:
        trials = f"{count(len(self.rows), 'trial')} ({_counts(self.rows)})"
        return [f"study {self.folder.study.name}: {trials}", self._driver_line()]

    def _driver_line(self) -> str:
        if self.driver is None:
            seen = self.said.get("driver", {}).get("now")
            since = f" since {_clock(seen, self.now)} (started on {self.said['driver']['host']})" if seen else ""
            return "nothing left to do" if self.is_over else f"no driver{since}; `run` goes on"
        if not self.tells:
            return f"driven by {self.driver}, which starts nothing yet, or nothing any more"
        left = self._seconds_left()
        parts = [
            f"driven by {self.driver} since {_clock(self.said['driver']['since'], self.now)}", *self._use(),
            f"about {duration(left)} left" if left is not None else "time left unknown",
        ]  # fmt: skip
        return "; ".join(parts)

    def _use(self) -> list[str]:
        """How much of the cluster is in use."""
        nodes = self.said.get("nodes", {})
        if not nodes:
            return []
        total = {kind: sum(node[kind] for node in nodes.values()) for kind in ("cpus", "gpus")}
        used = {kind: sum(node[f"used_{kind}"] for node in nodes.values()) for kind in ("cpus", "gpus")}
        kind, unit = ("gpus", "GPUs") if total["gpus"] else ("cpus", "CPUs")
        trials, evaluations = (self.said["waiting"][what] for what in ("trials", "evaluations"))
        return [
            f"{used[kind]:g} of {total[kind]:g} {unit} on {count(len(nodes), 'node')} in use",
            f"waiting: {count(trials, 'trial')}, {count(evaluations, 'evaluation')}",
        ]

    def _seconds_left(self) -> float | None:
        nodes = {name: Resources(node["cpus"], node["gpus"]) for name, node in self.said.get("nodes", {}).items()}
        going = {
            row.name: row.progress for row in self.rows
            if row.state not in ("cancelled", "failed") and (row.state not in _FINAL or row.progress.missing)
        }  # fmt: skip
        return seconds_left(self.folder, going, nodes, read_events(self.folder.path / EVENTS))

    # ---- the rows -----------------------------------------------------------------------------------------------

    def _row(self, name: str) -> _Row:
        folder, trial = self.folder, self.folder.trials[name]
        state = trial_state(folder, name, self.said, alive=self.tells, now=self.now)
        nimg, record = images(folder, name, done=state == "complete"), folder.last_record(name)
        speed = record.values.get("speed/img_per_second", 0.0) if record else 0.0
        running = state == "running"
        jobs = {(job.nimg, job.out) for job in folder.missing_evaluations(name)}
        missing = Counter(point for point, _ in jobs)
        records = sorted(folder.current_records(name), key=lambda r: r.nimg)
        ran = self.said.get("running", {}).get(name, {}) if self.tells else {}
        retries = self.said.get("troubles", {}).get(name, {}).get("retries", 0)
        cells = (
            name, trial.label, state, f"{nimg:,}", f"{nimg / trial.total_images:.0%}",
            f"{speed:,.0f}" if running and speed else "",
            duration((trial.total_images - nimg) / speed) if running and speed else "",
            f"{_num_evaluated(folder, name, sum(missing.values()))}/{folder.num_evaluations(name)}",
            *(_last(records, metric) for metric in self.metrics),
            _where(ran), f"{retries or ''}",
        )  # fmt: skip
        return _Row(name, state, Progress(nimg, speed, missing), cells)

    # ---- the foot -----------------------------------------------------------------------------------------------

    def _amiss(self) -> list[str]:
        found = []
        others = [name for name in self.said.get("trials", {}) if name not in self.folder.trials]
        if self.tells and others:
            found.append(f"the driver has another study file: {', '.join(others[:3])}{', ...' * (len(others) > 3)}")
        for job in self.said.get("homeless", ()) if self.tells else ():
            found.append(f"waits for devices that no node has: {job['key']} needs {job['needs']}")
        for name, trouble in self.said.get("troubles", {}).items():
            if trouble["end"] == "failed" or (self.tells and (trouble["until"] or 0.0) > self.now):
                found.append(f"{name}: {trouble['status'].replace('_', ' ')}: {_one_line(trouble['why'])}")
        return found[:_SHOWN_EVENTS] + (["..."] if len(found) > _SHOWN_EVENTS else [])

    def _events(self) -> list[str]:
        events = [event for event in last_events(self.folder.path / EVENTS, 200) if _is_news(event)][-_SHOWN_EVENTS:]
        return [f"{_clock(event['time'], self.now)}  {event_text(event)}" for event in events]


def event_text(event: Event) -> str:
    """An event in a line."""
    match event["event"]:
        case "driver_started":
            return f"driver started on {event['host']} (process {event['pid']})"
        case "driver_ended":
            return f"driver ended: {event['how']}" + (f": {_one_line(event['message'])}" if event["message"] else "")
        case "nodes":
            joined, lost = ", ".join(event["joined"]), ", ".join(event["lost"])
            return "; ".join(
                [*([f"nodes joined: {joined}"] if joined else []), *([f"nodes lost: {lost}"] if lost else [])]
            )
        case "started":
            again = f", start {event['attempt']} by this driver" if event["attempt"] > 1 else ""
            return f"{event['key']} started on {', '.join(event['nodes'])}{again}"
        case "ended":
            return f"{event['key']} ended after {duration(event['seconds'])}: {event['status'].replace('_', ' ')}"
        case "retry":
            return f"{event['key']} will be tried again after {event['pause']:g} s: {_one_line(event['message'])}"
        case "failure":
            return f"{event['key']} {event['state']}: {_one_line(event['message'])}"
        case "told":
            return _one_line(event["text"])
    return str(event["event"])


def _is_news(event: Event) -> bool:
    """Evaluations begin and end all the time; a job's trouble has a line of its own."""
    if event["event"] in ("started", "ended"):
        return bool(event["kind"] == "trial" and event.get("status", "done") == "done")
    return True


def _driver(folder: StudyFolder, said: Mapping[str, Any], now: float) -> str | None:
    """Who drives the study; None where nobody does. A lock may not be seen from another host, a fresh file is."""
    holder, about = folder.driver(), said.get("driver", {})
    if holder is not None:
        return holder
    if not about or about["ended"] is not None or about["host"] == socket.gethostname():
        return None
    return _process(about) if now - about["now"] <= about["every"] + _STALE_SECONDS else None


def _is_of(said: Mapping[str, Any], driver: str) -> bool:
    """Is it this driver's status, or one's that has ended or was killed?"""
    return bool(said) and said["driver"]["ended"] is None and _process(said["driver"]) == driver


def _process(about: Mapping[str, Any]) -> str:
    """As the study's lock names it."""
    return f"process {about['pid']} on {about['host']}"


def _metrics(folder: StudyFolder) -> tuple[str, ...]:
    """The metrics that have a column, as records name them."""
    wanted = folder.study.evaluation
    nll = ["nll"] if wanted.nll is not None else []
    distance = wanted.distance
    return (*nll, *([record_name(distance.metrics[0], distance.feature_net)] if distance is not None else []))


def _last(records: Sequence[EvalRecord], metric: str) -> str:
    """The newest value of a metric, on held-out images where it was measured there."""
    found = [r for r in records if r.metric == metric]
    best = [r for r in found if r.split == "test"] or found
    return f"{best[-1].value:.4g}" if best else ""


def _num_evaluated(folder: StudyFolder, name: str, num_missing: int) -> int:
    exports = folder.run_folder(name) / "exports"
    exported = sum(
        folder.num_requests(name, nimg)
        for nimg in folder.trials[name].export_images if (exports / f"{nimg:012d}" / "manifest.json").exists()
    )  # fmt: skip
    return max(0, exported - num_missing)


def _where(ran: Mapping[str, Any]) -> str:
    """A running job's nodes and what it has of them."""
    if not ran:
        return ""
    nodes: list[str] = ran["nodes"]
    num, unit = (ran["gpus"], "GPU") if ran["gpus"] else (ran["cpus"], "CPU")
    devices = f"{num:g} {unit}{'' if num == 1 else 's'}"
    return f"{nodes[0]}: {devices}" if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more: {devices} each"


def _block(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _counts(rows: Iterable[_Row]) -> str:
    """`3 running, 1 retrying`."""
    states = Counter(row.state.partition(" in ")[0] for row in rows)
    return ", ".join(f"{num} {state}" for state, num in states.items())


def _interest(row: _Row) -> int:
    return next((i for i, state in enumerate(_INTEREST) if row.state.startswith(state)), len(_INTEREST))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _clock(moment: float, now: float) -> str:
    """A time of day; of another day with its date."""
    form = "%H:%M:%S" if abs(now - moment) < 43200 else "%b %d %H:%M"
    return time.strftime(form, time.localtime(moment))
