"""What the files of a study say while it runs, read as anybody could: how far the trials are, which results exist."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LAST_BYTES = 65536

Marks = dict[str, tuple[int, int]]  # result file -> (when it was written [ns], inode): another file is another mark


class StudyWatch:
    """The files of one study."""

    def __init__(self, out: Path, *, budget: int, num_trials: int) -> None:
        self.out = out
        self._budget, self._num_trials = budget, num_trials

    def trials(self) -> list[Path]:
        return sorted(path for path in self.out.glob("trials/*") if path.is_dir())

    def images(self) -> dict[str, int]:
        """Images that each trial has seen, by its newest record."""
        return {run.name: last_image(run) for run in self.trials()}

    def progress(self) -> float:
        """How much of the training is done, 0 to 1."""
        return sum(self.images().values()) / (self._budget * self._num_trials)

    def results(self) -> Marks:
        """The files that prove a trial or an evaluation done."""
        files = [*self.out.glob("trials/*/result.json"), *self.out.glob("trials/*/evals/*/*.json")]
        marks: Marks = {}
        for path in files:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            marks[str(path.relative_to(self.out))] = (stat.st_mtime_ns, stat.st_ino)
        return marks

    def events(self) -> list[dict[str, Any]]:
        """The journal of all drivers."""
        try:
            lines = (self.out / "events.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        return [event for line in lines if (event := _parsed(line)) is not None]

    def doubles(self) -> list[str]:
        """Evaluations of which there is more than one result: the same export, measured in the same way."""
        found: Counter[str] = Counter()
        for path in self.out.glob("trials/*/evals/*/*.json"):
            spec = json.loads(path.read_text())["spec"]
            found[f"{path.parent.relative_to(self.out)} {json.dumps(spec, sort_keys=True)}"] += 1
        return [what for what, count in found.items() if count > 1]

    def layouts(self, trial: str) -> dict[int, dict[str, Any]]:
        """By images seen: how the trial was computed when that checkpoint was written."""
        files = sorted((self.out / "trials" / trial / "checkpoints").glob("[0-9]*/state.json"))
        states = [json.loads(path.read_text()) for path in files]
        return {int(state["nimg"]): state["layout"] for state in states}


def last_image(run: Path) -> int:
    """Images seen at the end of the newest segment of a run's records; 0 where there is none."""
    segments = sorted(run.glob("metrics.*.jsonl"), key=lambda path: int(path.name.split(".")[1]))
    for path in reversed(segments):
        with open(path, "rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - _LAST_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is being written
        record = _parsed(lines[-1]) if lines else None
        if record is not None:
            return int(record["nimg"])
        return int(path.name.split(".")[1])
    return 0


def last_written(run: Path) -> float:
    """When a run last wrote a training record [seconds since 1970]; 0.0 where it never did."""
    return max((path.stat().st_mtime for path in run.glob("metrics.*.jsonl")), default=0.0)


def trial_in(command: str) -> str | None:
    """The trial that a training process's command line names."""
    match = re.search(r"trials/([^/\s]+)/", command)
    return match[1] if match else None


def new_or_changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Results of `before` that are no longer the same files in `after`."""
    return [name for name, mark in before.items() if after.get(name) != mark]


def started_again(events: Iterable[Mapping[str, Any]], finished: Mapping[str, Any], *, since: float) -> list[str]:
    """Jobs that were started after `since` [seconds since 1970] though their result was among `finished`."""
    keys = [str(event["key"]) for event in events if event["event"] == "started" and event["time"] > since]
    return [key for key in keys if _result_of(key) in finished]


def _result_of(key: str) -> str:
    """The file that proves a job done: a trial is called TRIAL, an evaluation TRIAL/IMAGES/KEY, perhaps with a part."""
    trial, *rest = key.split(" ")[0].split("/")
    return f"trials/{trial}/evals/{'/'.join(rest)}.json" if rest else f"trials/{trial}/result.json"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
