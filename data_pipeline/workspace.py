"""A folder that is built beside its place and appears there in one step, complete.

`OUT` is built in `.OUT.preparing` next to it, under a lock that the kernel drops when the process dies, however it
dies. What a dead process left is removed at the next start; or found again, where the builder can go on with it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import fsync_file, write_atomic
from data_pipeline.progress import say


@dataclass(frozen=True)
class Request:
    """What is being built."""

    command: str  # in the user's words
    decides: str  # all that decides the result: the command's options and the state of the originals


@dataclass(frozen=True)
class Workspace:
    """Where a folder is being built."""

    out: Path

    @property
    def root(self) -> Path:
        """The folder of all the others."""
        return self.out.parent / f".{self.out.name}.preparing"

    @property
    def lock(self) -> Path:
        """The file that is locked."""
        return self.out.parent / f".{self.out.name}.lock"

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
def workspace(out: Path, *, request: Request | None = None) -> Iterator[Workspace]:
    """Build `out`: removed without a trace unless `publish` was called.

    With a `request`, which says all that decides the result, the files of an unfinished result stay, and the next
    workspace with the same request has them.

    Raises:
        DataError: another process is building the same folder, another request is unfinished there, or `out` is a
            mount point.
        OSError: with the workspace's name in it, for instance when the disk is full.
    """
    out = Path(os.path.realpath(out))  # a link would be replaced, not what it points to
    if os.path.ismount(out):
        raise DataError(f"{out} is a mount point, which no folder can replace. Name a folder inside it: {out / 'data'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Workspace(out)
    with _locked(work.lock, out):
        if request is not None and not _is_over(work):
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


def _refuse_another(work: Workspace, request: Request) -> None:
    """Hours of another command's work are not ours to remove; an hour's first minutes, with nothing noted, are."""
    noted = _requested(work)
    if not _has_files(work.journal) or noted.decides == request.decides:
        return
    if noted.command == request.command:
        raise DataError(
            f"the originals have changed since {work.root} was begun, and what is done there was made from the old "
            f"ones. To begin anew with those of now: rm -r {work.root}"
        )
    raise DataError(
        f"{work.root} holds what another command has done so far of {work.out} (see {work.root / 'request'}). "
        f"Finish that one, choose another --out, or give it up: rm -r {work.root}"
    )


def _requested(work: Workspace) -> Request:
    try:
        return Request(**json.loads((work.root / "request").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # TypeError, ValueError: of an earlier version
        return Request("", "")


def _clear(work: Workspace, request: Request | None) -> None:
    """Make the folders, with the unfinished result of the same request if there is one."""
    if request is None or _requested(work).decides != request.decides or _is_over(work):
        shutil.rmtree(work.root, ignore_errors=True)
    shutil.rmtree(work.scratch, ignore_errors=True)
    for folder in (work.scratch, work.result, work.journal):
        folder.mkdir(parents=True, exist_ok=True)
    if request is not None:
        write_atomic(work.root / "request", json.dumps(asdict(request), indent=2))


def clear_leftovers(out: Path) -> None:
    """Remove what a process left that died between publishing `out` and the end of its workspace."""
    work = Workspace(Path(os.path.realpath(out)))
    if (work.root.exists() or work.lock.exists()) and _is_over(work):
        with suppress(DataError, OSError), _locked(work.lock, out):  # a living process removes it by itself
            shutil.rmtree(work.root, ignore_errors=True)


def _is_over(work: Workspace) -> bool:
    """Whether there is no unfinished result: it was published, or is being removed."""
    return not work.result.exists()


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
