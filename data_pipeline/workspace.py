"""A folder that is built beside its place and appears there in one step, complete.

`OUT` is built in `.OUT.preparing` next to it, under a lock that the kernel drops when the process dies, however it
dies: what a dead process left is removed at the next start.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import fsync_file


@dataclass(frozen=True)
class Workspace:
    """Where a folder is being built."""

    out: Path
    root: Path

    @property
    def result(self) -> Path:
        """What will be `out`."""
        return self.root / "result"

    @property
    def scratch(self) -> Path:
        """Room for downloads; removed at the end."""
        return self.root / "scratch"

    def publish(self) -> None:
        """Move the result to its place, in one step."""
        for folder in (*self.result.iterdir(), self.result):
            fsync_file(folder)
        os.rename(self.result, self.out)  # succeeds only where `out` does not exist or is an empty folder
        fsync_file(self.out.parent)


@contextmanager
def workspace(out: Path) -> Iterator[Workspace]:
    """Build `out`: removed without a trace unless `publish` was called.

    Raises:
        DataError: another process is building the same folder.
        OSError: with the workspace's name in it, for instance when the disk is full.
    """
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    root = out.parent / f".{out.name}.preparing"
    with _locked(out.parent / f".{out.name}.lock", out):
        work = Workspace(out, root)
        shutil.rmtree(root, ignore_errors=True)  # left by a process that died
        try:
            work.scratch.mkdir(parents=True)
            work.result.mkdir()
            yield work
        except OSError as error:
            error.filename = error.filename or str(out)
            raise
        finally:
            shutil.rmtree(root, ignore_errors=True)


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    fd = -1
    try:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another process is preparing {out} right now. Wait for it, or stop it.") from None
            if _is_same_file(fd, path):
                break
            os.close(fd)  # its last holder removed it between our open and our lock
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is still locked
    finally:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
