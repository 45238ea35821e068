"""What `logs` prints: the output of trials, of all their processes and lives, at one place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.files.folder import StudyFolder
from cluster.watching.status_table import is_driven

_LAST_LINES = 10  # of each trial where there are several
_TAIL_BYTES = 65536
_POLL_SECONDS = 1.0


class LogFile:
    """One log file, read on from where it was left."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._offset = 0
        self._part = b""  # of a line that is still being written

    def new_lines(self, *, last: int | None = None) -> list[str]:
        """The whole lines that have come since the last call; `last`: at most so many, from the file's end."""
        try:
            with open(self._path, "rb") as file:
                if last is not None:
                    self._offset = max(self._offset, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
                file.seek(self._offset)
                new = file.read()
        except OSError:  # not there yet
            return []
        self._offset += len(new)
        *whole, self._part = (self._part + new).split(b"\n")
        lines = [f"{self._prefix}{_as_shown(line)}" for line in whole]
        return lines if last is None else lines[-last:]


def show_logs(
    folder: StudyFolder, trials: Sequence[str], *, follow: bool, show: Callable[[str], None] = print,
    seconds: float = _POLL_SECONDS,
) -> None:  # fmt: skip
    """Print the logs of these trials, or the last lines of all trials' where none is named.

    `follow`: and what is added, as long as somebody drives the study or one of them trains.
    """
    names = list(trials) or list(folder.trials)
    files: dict[Path, LogFile] = {}
    last = None if trials else _LAST_LINES
    while True:
        going = follow and (is_driven(folder) or any(folder.is_training(name) for name in names))
        for name in names:
            for path in log_files(folder.run_folder(name)):
                file = files.setdefault(path, LogFile(path, _prefix(name, path, several=len(names) > 1)))
                for line in file.new_lines(last=last):
                    show(line)
        if not going:
            return
        last = None
        time.sleep(seconds)


def log_files(run: Path) -> list[Path]:
    """A trial's log files: that of its first node, then those of the others."""
    return [*run.glob("log.txt"), *sorted(run.glob("log.node*.txt"))]


def _prefix(trial: str, path: Path, *, several: bool) -> str:
    node = path.name.removeprefix("log").removesuffix("txt").strip(".")
    parts = [*([trial] if several else []), *([node] if node else [])]
    return f"{' '.join(parts)} | " if parts else ""


def _as_shown(line: bytes) -> str:
    """As a terminal would show it: a progress bar's newest state."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
