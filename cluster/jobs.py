"""What is run for a study: trials and evaluations, what they take, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["done", "user_error", "stopped", "failed"]


@dataclass(frozen=True)
class Resources:
    """Devices, on one machine or in all."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)

    def fits_in(self, free: Resources) -> bool:
        return self.cpus <= free.cpus + 1e-9 and self.gpus <= free.gpus + 1e-9

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


@dataclass(frozen=True)
class TrialJob:
    """Train one trial to its end, or go on where it stopped."""

    key: str  # the trial's name
    folder: Path
    num_processes: int
    resources: Resources
    seconds: float  # expected


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
    resources: Resources
    seconds: float


Job = TrialJob | EvalJob


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `message` says why, unless it is done."""

    job: Job
    status: Status
    message: str = ""


class Backend(Protocol):
    """Where jobs run: Ray, or a simulation."""

    def total(self) -> Resources:
        """All devices of the cluster, now."""

    def largest(self) -> Resources:
        """What one job can have at best: the devices of the largest node."""

    def start(self, job: Job) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait at most so long; jobs that have ended since the last call."""

    def now(self) -> float:
        """Seconds on the backend's clock."""

    def stop(self) -> None:
        """End all jobs: trials save first. Returns when they have ended."""

    def close(self) -> None: ...


class StudyFiles(Protocol):
    """What exists of a study: the truth, whoever made it."""

    def trial_done(self, trial: str) -> bool: ...

    def missing_evaluations(self, trial: str) -> list[EvalJob]:
        """Evaluations that the trial's exports call for and that no file proves done."""
