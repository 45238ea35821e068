"""A folder that is built beside its place and appears there in one step, complete.

`OUT` is built in `.OUT.preparing` next to it, under a lock that the kernel drops when the process dies, however it
dies. What a dead process left is removed at the next start; or found again, where the builder can go on with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import fsync_file, write_atomic
from data_pipeline.progress import say


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

    @property
    def journal(self) -> Path:
        """Room for notes on the result so far; they stay with it, and are removed when it is published."""
        return self.root / "journal"

    def publish(self) -> None:
        """Move the result to its place, in one step.

        Raises:
            DataError: something else has appeared there meanwhile.
        """
        for entry in (*self.result.iterdir(), self.result):
            fsync_file(entry)
        try:
            os.rename(self.result, self.out)  # succeeds only where `out` does not exist or is an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise DataError(
                f"{self.out} has appeared while it was being prepared. Move it away and run again."
            ) from None
        fsync_file(self.out.parent)


@contextmanager
def workspace(out: Path, *, request: str | None = None) -> Iterator[Workspace]:
    """Build `out`: removed without a trace unless `publish` was called.

    With a `request`, which says all that decides the result, the files of an unfinished result stay, and the next
    workspace with the same request has them.

    Raises:
        DataError: another process is building the same folder, or another request is unfinished there.
        OSError: with the workspace's name in it, for instance when the disk is full.
    """
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Workspace(out, out.parent / f".{out.name}.preparing")
    with _locked(out.parent / f".{out.name}.lock", out):
        if request is not None:
            _refuse_another(work, request)
        try:
            _clear(work, request)
            yield work
        except OSError as error:
            error.filename = error.filename or str(out)
            raise
        finally:
            if request is not None and _has_files(work.result):
                shutil.rmtree(work.scratch, ignore_errors=True)
                say(f"what is done is kept in {work.root}: the same command goes on from there.")
            else:
                shutil.rmtree(work.root, ignore_errors=True)


def _refuse_another(work: Workspace, request: str) -> None:
    """Hours of another command's work are not ours to remove; an hour's first minutes, with nothing noted, are."""
    if _has_files(work.journal) and _requested(work) != request:
        raise DataError(
            f"{work.root} holds what another command has done so far of {work.out} (see {work.root / 'request'}). "
            f"Finish that one, choose another --out, or give it up: rm -r {work.root}"
        )


def _requested(work: Workspace) -> str | None:
    noted = work.root / "request"
    return noted.read_text() if noted.exists() else None


def _clear(work: Workspace, request: str | None) -> None:
    """Make the folders, with the unfinished result of the same request if there is one."""
    if request is None or _requested(work) != request:
        shutil.rmtree(work.root, ignore_errors=True)
    shutil.rmtree(work.scratch, ignore_errors=True)
    for folder in (work.scratch, work.result, work.journal):
        folder.mkdir(parents=True, exist_ok=True)
    if request is not None:
        write_atomic(work.root / "request", request)


def _has_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


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
