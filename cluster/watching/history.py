"""A study's past, as its journal tells it: which jobs ran where and when, over all lives of its driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from cluster.scheduling.jobs import Resources
from cluster.scheduling.pool import NOTHING
from cluster.watching.journal import Event

CUT_OFF = "cut off"  # the status of what ran when the driver was killed, ...
PAUSED = "paused"  # ... and when it ended by itself: trials had saved
WELL = ("done", PAUSED)


@dataclass(frozen=True)
class Start:
    """One start of a job, to its end. Times are seconds on a clock that stands still while nobody drives the study."""

    key: str
    kind: Literal["trial", "evaluation"]
    nodes: tuple[str, ...]
    processes: int
    per_node: Resources
    begin: float
    end: float
    status: str
    startup: float | None  # seconds
    message: str

    @property
    def trial(self) -> str:
        return self.key.partition("/")[0]

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def held(self) -> Resources:
        """Devices, on all nodes together."""
        return self.per_node * len(self.nodes)

    @property
    def layout(self) -> str:
        words = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return words + (f" on {len(self.nodes)} nodes" if len(self.nodes) > 1 else "")


@dataclass(frozen=True)
class Stay:
    """When a node was part of the cluster."""

    node: str
    devices: Resources
    begin: float
    end: float


@dataclass
class History:
    """What is known. `makespan`: seconds in which the study was driven."""

    num_lives: int = 0
    num_killed: int = 0  # lives that ended without a word
    makespan: float = 0.0
    starts: list[Start] = field(default_factory=list)  # in the order of their ends
    stays: list[Stay] = field(default_factory=list)
    retries: list[Event] = field(default_factory=list)
    failures: list[Event] = field(default_factory=list)
    nodes_lost: list[str] = field(default_factory=list)

    @cached_property
    def by_key(self) -> dict[str, list[Start]]:
        """Each job's starts, in their order."""
        found: dict[str, list[Start]] = {}
        for start in self.starts:
            found.setdefault(start.key, []).append(start)
        return found

    @property
    def nodes(self) -> dict[str, Resources]:
        """The devices of every node that has ever been there."""
        return {stay.node: stay.devices for stay in self.stays}

    @property
    def capacity(self) -> Resources:
        """The cluster's devices, the mean over the makespan."""
        total = sum((stay.devices * (stay.end - stay.begin) for stay in self.stays), NOTHING)
        return total * (1 / self.makespan) if self.makespan else NOTHING


def read_history(events: Sequence[Event], last_seen: float | None = None) -> History:
    """`last_seen`: when the newest driver was still alive, if it wrote no end."""
    history = History()
    for life, seen in _lives(events, last_seen):
        _add_life(history, life, seen)
    return history


def _lives(events: Iterable[Event], last_seen: float | None) -> list[tuple[list[Event], float | None]]:
    """The events of each life of the driver, and when it was last seen by others."""
    lives: list[list[Event]] = []
    seen: list[float | None] = []
    for event in events:
        if event["event"] == "driver_started":
            lives.append([])
            seen.append(event["last_seen"])
        if lives:
            lives[-1].append(event)
    return list(zip(lives, [*seen[1:], last_seen], strict=True)) if lives else []


def _add_life(history: History, life: Sequence[Event], seen: float | None) -> None:
    first, last = life[0]["time"], life[-1]
    killed = last["event"] != "driver_ended"
    end = max(last["time"], seen or 0.0) if killed else last["time"]
    shift = history.makespan - first  # onto the clock of driven time
    running: dict[str, Start] = {}
    there: dict[str, Stay] = {}
    for event in life:
        now = event["time"] + shift
        match event["event"]:
            case "nodes":
                there |= {name: Stay(name, Resources(**has), now, now) for name, has in event["joined"].items()}
                history.stays += [replace(there.pop(name), end=now) for name in event["lost"] if name in there]
                history.nodes_lost += event["lost"]
            case "started":
                running[event["key"]] = _start(event, now)
            case "ended" if event["key"] in running:
                start = running.pop(event["key"])
                how = {name: event[name] for name in ("status", "startup", "message")}
                history.starts.append(replace(start, end=now, **how))
            case "retry":
                history.retries.append(event)
            case "failure":
                history.failures.append(event)
    status = CUT_OFF if killed else PAUSED
    history.starts += [replace(start, end=end + shift, status=status) for start in running.values()]
    history.stays += [replace(stay, end=end + shift) for stay in there.values()]
    history.num_lives += 1
    history.num_killed += killed
    history.makespan += end - first


def _start(event: Event, now: float) -> Start:
    per_node = Resources(event["cpus"], event["gpus"])
    return Start(
        event["key"], event["kind"], tuple(event["nodes"]), event["processes"], per_node, now, now, "running", None, ""
    )
