"""Marks in files that end things: a trial for good, or the driver of a study. Whoever sees the storage can set them.

RUN/verdict.json: the trial is not trained any further.  STUDY/stop.json: the driver is to save and end.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.files import write_json

State = Literal["cancelled", "diverged"]
VERDICT, STOP = "verdict.json", "stop.json"
FORGIVEN = "forgiven.json"  # in a run's folder: how far it had come when a verdict was taken back


@dataclass(frozen=True)
class Verdict:
    """Why a trial is not trained any further."""

    state: State
    reason: str
    time: float  # seconds since 1970
    nimg: int  # images that it had seen


def read_verdict(run: Path) -> Verdict | None:
    """That of a run folder; None where there is none, or one that cannot be read."""
    try:
        return Verdict(**json.loads((run / VERDICT).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_verdict(run: Path, state: State, reason: str, nimg: int) -> Verdict:
    """Set it, unless there is one already. Returns the one that stands."""
    before = read_verdict(run)
    if before is not None:
        return before
    verdict = Verdict(state, reason, time.time(), nimg)
    write_json(run / VERDICT, asdict(verdict))
    return verdict


def remove_verdict(run: Path) -> bool:
    """Give the trial another chance. Returns whether there was a verdict."""
    before = read_verdict(run)
    if before is not None:
        write_json(run / FORGIVEN, {"nimg": before.nimg})
    try:
        (run / VERDICT).unlink()
    except FileNotFoundError:
        return False
    return True


def forgiven_until(run: Path) -> int:
    """Images up to which a trial that has another chance is not judged; -1 for one that never ended."""
    try:
        return int(json.loads((run / FORGIVEN).read_text())["nimg"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def ask_to_stop(study: Path) -> None:
    """The driver of this study is to save and end."""
    write_json(study / STOP, {"time": time.time()})


def asked_to_stop(study: Path) -> bool:
    """Was it asked to? Asking once is answered once."""
    try:
        (study / STOP).unlink()
    except FileNotFoundError:
        return False
    return True
