"""Processes known by a mark in their environment, which all that they start inherits: found, and killed at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import psutil

MARK = "FAULTS_MARK"  # TOKEN/WHERE: of which rehearsal, on which of its nodes


@contextlib.contextmanager
def passing_on(mark: str) -> Iterator[None]:
    """Mark the processes that this one starts in the block."""
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]


def mark_of(process: psutil.Process) -> str:
    """ "" for a process without one, one that has ended, or one of somebody else's."""
    try:
        mark: str = process.environ().get(MARK, "") if process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.Error, OSError):
        return ""
    return mark


def command_of(process: psutil.Process) -> str:
    """Its command line, or the title that it gave itself; "" when it has ended."""
    with contextlib.suppress(psutil.Error, OSError):
        return " ".join(process.cmdline()).strip()
    return ""


def found(mark: str, *, where: Callable[[str], bool] = lambda command: True) -> list[psutil.Process]:
    """The living processes of a mark, or of all marks that begin with it and a slash, whose command is `where`."""
    return [process for process in _with(mark) if where(command_of(process))]


def kill(processes: Iterable[psutil.Process]) -> None:
    """kill -9, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        _signal(process, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(_is_there(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def kill_all(mark: str) -> int:
    """kill -9 of all of a mark as if at one moment: all are stopped before the first is killed. Returns how many."""
    stopped: dict[int, psutil.Process] = {}
    while new := [process for process in _with(mark) if process.pid not in stopped]:
        for process in new:
            _signal(process, signal.SIGSTOP)
            stopped[process.pid] = process
    kill(stopped.values())
    return len(stopped)


def environment(mark: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with a mark."""
    return {**os.environ, **(more or {}), MARK: mark}


def _with(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        of = mark_of(process)
        if process.pid != os.getpid() and (of == mark or of.startswith(f"{mark}/")):
            yield process


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error, OSError):
        process.send_signal(number)


def _is_there(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
