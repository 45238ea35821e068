"""What is run for a study: trials and evaluations, what they take, where they run, and how they ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["done", "user_error", "stopped", "failed", "lost", "diverged", "out_of_memory", "no_space"]


@dataclass(frozen=True)
class Resources:
    """Devices, on one node or in all."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)

    def __mul__(self, factor: float) -> Resources:
        return Resources(self.cpus * factor, self.gpus * factor)

    def fits_in(self, free: Resources) -> bool:
        return self.cpus <= free.cpus + 1e-9 and self.gpus <= free.gpus + 1e-9

    @property
    def devices(self) -> float:
        """What time is reckoned with: GPUs, or CPUs where there are none."""
        return self.gpus or self.cpus

    def __str__(self) -> str:
        cpus, gpus = (
            f"{num:g} {kind}" + ("" if num == 1 else "s") for num, kind in ((self.cpus, "CPU"), (self.gpus, "GPU"))
        )
        return f"{cpus} and {gpus}" if self.gpus else cpus


@dataclass(frozen=True)
class Shape:
    """One way to run a job: so many nodes, the same on each."""

    per_node: Resources
    num_nodes: int = 1
    num_processes: int = 1  # on all nodes together

    @property
    def total(self) -> Resources:
        return self.per_node * self.num_nodes

    def __str__(self) -> str:
        return str(self.per_node) + (f" on each of {self.num_nodes} nodes" if self.num_nodes > 1 else "")


@dataclass(frozen=True)
class TrialJob:
    """Train one trial to its end, or go on where it stopped."""

    key: str  # the trial's name
    folder: Path
    shapes: tuple[Shape, ...]  # the first is wanted; the others are for a cluster that has lost devices
    seconds: float  # expected, in the first shape
    priority: int = 0  # higher goes first
    images: int = 0  # its budget


@dataclass(frozen=True)
class EvalJob:
    """Measure one export in one way."""

    key: str  # unique: trial, nimg, the hash of what is measured on which weights, and the shard
    trial: str
    nimg: int
    export: Path
    out: Path  # the file that proves it was done
    request: Any  # an evaluation.request.EvalRequest
    shard: tuple[int, int]  # which of how many processes that share it
    shapes: tuple[Shape, ...]
    seconds: float
    priority: int = 0


Job = TrialJob | EvalJob


@dataclass(frozen=True)
class Placement:
    """A job on its nodes."""

    job: Job
    shape: Shape
    nodes: tuple[str, ...]  # as many as the shape has, each another one
    attempt: int = 1

    @property
    def seconds(self) -> float:
        """Expected, in this shape."""
        return self.job.seconds * self.job.shapes[0].num_processes / self.shape.num_processes


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `message` says why, unless it is done."""

    job: Job
    status: Status
    message: str = ""
    startup: float | None = None  # seconds from the decision to its first step, or to the beginning of an evaluation


class Backend(Protocol):
    """Where jobs run: Ray, or a simulation."""

    def nodes(self) -> Mapping[str, Resources]:
        """The devices of each living node, by its id."""

    def name(self, node: str) -> str:
        """What people call a node: its address or host name."""

    def start(self, placement: Placement) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait at most so long; jobs that have ended since the last call."""

    def now(self) -> float:
        """Seconds on the backend's clock."""

    @property
    def grows(self) -> bool:
        """Can the cluster be asked for more nodes?"""

    def want(self, shapes: list[Shape]) -> None:
        """Ask a cluster that grows for room for these, beside one another."""

    def stop_job(self, key: str) -> None:
        """Let one job save and end; its outcome follows."""

    def stop(self) -> None:
        """End all jobs: trials save first. Returns when they have ended."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Changes:
    """What somebody wants of a study that runs: its file was edited, trials were cancelled or given another chance."""

    added: tuple[TrialJob, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)  # trial -> why
    told: tuple[str, ...] = ()  # what to say about it
    stop: bool = False


class StudyFiles(Protocol):
    """What exists of a study: the truth, whoever made it."""

    def job(self, trial: str) -> TrialJob | None:
        """As it is wanted now; None where it was taken out of the study."""

    def trial_done(self, trial: str) -> bool: ...

    def proved(self, job: Job) -> bool:
        """Does a file prove the job done, however its last start ended?"""

    def shows_all(self, trial: str) -> bool:
        """Can all that a finished trial has written be seen here? A shared file system may take its time."""

    def verdict(self, trial: str) -> str | None:
        """Why a trial ended for good before its end: cancelled, diverged; None where it did not."""

    def missing_evaluations(self, trial: str) -> list[EvalJob]:
        """Evaluations that the trial's exports call for and that no file proves done."""

    def exported(self, trials: Iterable[str]) -> Iterable[str]:
        """Those of the trials that may have exports which `missing_evaluations` has not seen. Asked all the time."""

    def progress(self, trial: str) -> int:
        """Images that are safe: those of the newest checkpoint."""

    def diverging(self, trials: Iterable[str]) -> Mapping[str, str]:
        """Those of the running trials that should be stopped for good, and why. Asked all the time."""

    def end_trial(self, trial: str, state: Literal["cancelled", "diverged"], reason: str) -> None:
        """Write that the trial has ended for good."""

    def shrink_micro_batch(self, trial: str) -> str | None:
        """After it ran out of memory: halve its micro-batch, once. What was done; None where it cannot be."""

    def changes(self) -> Changes:
        """What has been asked for since the last look. Asked all the time."""
