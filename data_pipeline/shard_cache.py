"""Shards of a remote data set on this machine's disk: a bounded folder that all its processes share.

A shard's file is named by its sha256 and gets that name only when all of its bytes are there and match, so a file of
that name and the right size needs no second look (every sample's crc32 is checked when it is read, besides).

The folder is its own book-keeping, so no dying process can leave it wrong: what lies in it is what is counted, a
file's time stamp says when it was last opened, and every lock is a flock, which the kernel drops with its process.
`SHA256.part` is a shard on its way; its size, reserved at once, is the shard's. Who holds its lock fetches it, others
wait; a part that nobody holds was left by a process that died. Readers hold a shared lock on their shards.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from data_pipeline.manifest import Shard
from data_pipeline.storage import DEFAULT_PATIENCE, Storage

_POLL = 0.05  # seconds between two looks at what another process is doing


def default_folder() -> Path:
    """Where shards are kept: in the home folder, for all working copies and jobs of a user."""
    return Path.home() / ".cache" / "diffusion-scaling" / "shards"


@dataclass(frozen=True)
class CacheSettings:
    """How remote shards are fetched and kept."""

    folder: Path = field(default_factory=default_folder)  # on a local disk; for all runs of one user
    max_bytes: int = 64 << 30  # of the whole folder
    patience: float = DEFAULT_PATIENCE  # seconds without a new byte until a download is given up
    num_connections: int = 4  # shards fetched ahead at a time, by each process


class ShardCache:
    """The shards of one `storage`, as local files.

    May be used by several threads and after a fork; threads start with the first `prefetch` of a process.
    """

    def __init__(self, storage: Storage, settings: CacheSettings) -> None:
        assert settings.num_connections >= 1
        self._storage = storage
        self._settings = settings
        self._own = _Process()

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Storage, CacheSettings]]:
        return ShardCache, (self._storage, self._settings)

    def path(self, shard: Shard) -> Path:
        """Where `shard` lies, if it is there."""
        return self._settings.folder / f"{shard.sha256}.tar"

    def open(self, shard: Shard) -> int:
        """A descriptor (read only, the caller's to close) of the complete shard, fetched first if need be.

        Raises:
            DataError: it cannot be had, see `Storage.download`, or is larger than the cache may be.
            OSError: the disk is full or forbidden.
        """
        while (fd := self._opened(shard)) is None:
            self._ensure(shard)
        return fd

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Fetch `shards` in the background, in this order; forgets what earlier calls wished and is not begun.

        As many as fit into half of the bound are fetched: the other half is for shards that are being read. What
        goes wrong here is told by `open`.
        """
        own = self._process()
        with own.changed:
            own.wishes = deque(self._within(shards, self._settings.max_bytes // 2))
            for _ in range(self._settings.num_connections - own.num_threads if own.wishes else 0):
                own.num_threads += 1
                threading.Thread(target=self._work, args=(own,), name="shards", daemon=True).start()
            own.changed.notify_all()

    def close(self) -> None:
        """End prefetching. A download that is under way ends by itself; a process that exits does not wait for it."""
        own, self._own = self._process(), _Process()
        with own.changed:
            own.wishes.clear()
            own.closed = True
            own.changed.notify_all()

    def _process(self) -> _Process:
        if self._own.pid != os.getpid():  # a fork takes along neither threads nor the meaning of locks
            self._own = _Process()
        return self._own

    @staticmethod
    def _within(shards: Sequence[Shard], max_bytes: int) -> Iterator[Shard]:
        for shard in shards:
            max_bytes -= shard.num_bytes
            if max_bytes < 0:
                return
            yield shard

    def _work(self, own: _Process) -> None:
        while True:
            with own.changed:
                own.changed.wait_for(lambda: own.wishes or own.closed)
                if own.closed:
                    return
                shard = own.wishes.popleft()
            with suppress(DataError, OSError):  # who opens the shard meets the error
                fd = self._opened(shard)  # and counts as used just now
                if fd is None:
                    self._ensure(shard)
                else:
                    os.close(fd)

    def _ensure(self, shard: Shard) -> None:
        """Fetch a shard, or share the outcome if another thread is fetching it."""
        own = self._process()
        with own.changed:
            outcome = own.running.get(shard.sha256)
            is_mine = outcome is None
            if outcome is None:
                outcome = own.running[shard.sha256] = Future()
        if is_mine:
            try:
                self._fetch(shard)
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                with own.changed:
                    del own.running[shard.sha256]
        outcome.result()

    def _opened(self, shard: Shard) -> int | None:
        path = self.path(shard)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size != shard.num_bytes:
            os.close(fd)
            path.unlink(missing_ok=True)
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)  # in use
        os.utime(fd, ns=(now := time.time_ns(), now))  # the kernel's own "now" is some ms coarse
        return fd

    def _fetch(self, shard: Shard) -> None:
        if shard.num_bytes > self._settings.max_bytes:
            raise DataError(
                f"{self._storage}/{shard.file} has {shard.num_bytes:,} bytes, the cache {self._settings.folder} may "
                f"hold {self._settings.max_bytes:,}. Set data.remote.cache_gb to many times the size of a shard."
            )
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        part = self.path(shard).with_suffix(".part")
        began = time.time_ns()
        last_write, seen_at = 0, 0.0  # of another process that is fetching it
        while not self.path(shard).exists():
            self._raise_if_it_failed(shard, since=began)
            with _lockable(part, os.O_CREAT) as fd:
                if _try_lock(fd):
                    if _is_same_file(fd, part):  # else its holder renamed or removed it before we had the lock
                        self._receive(shard, fd, part, began)
                    continue
                written = os.fstat(fd).st_mtime_ns
            if written != last_write:
                last_write, seen_at = written, time.monotonic()
            # The other process loses patience itself, unless it is stopped.
            elif time.monotonic() - seen_at > 2 * self._storage.patience:
                raise DataError(
                    f"another process is fetching {self._storage}/{shard.file} and has got nothing for "
                    f"{2 * self._storage.patience:g} s. Find it with fuser {part} and end it."
                )
            time.sleep(_POLL)

    def _failure(self, shard: Shard) -> Path:
        """Where a process that gave up a shard tells the others why, or each would lose its own patience in turn."""
        return self.path(shard).with_suffix(".failed")

    def _raise_if_it_failed(self, shard: Shard, *, since: int) -> None:
        """Raise what another process noted at `since` (Unix nanoseconds) or later."""
        with suppress(FileNotFoundError):
            if self._failure(shard).stat().st_mtime_ns >= since:
                raise DataError(self._failure(shard).read_text())

    def _receive(self, shard: Shard, fd: int, part: Path, began: int) -> None:
        """Fetch a shard into its locked part, and give it its name."""
        try:
            if self.path(shard).exists():
                part.unlink()
                return
            self._raise_if_it_failed(shard, since=began)
            self._reserve(fd, shard.num_bytes)
            with open(fd, "wb", closefd=False) as file:
                self._storage.download(shard.file, file, num_bytes=shard.num_bytes, sha256=shard.sha256)
            with self._folder_lock():  # who counts must find the one name or the other
                os.rename(part, self.path(shard))
                self._failure(shard).unlink(missing_ok=True)
        except BaseException as error:
            if isinstance(error, DataError):
                with suppress(OSError):
                    write_atomic(self._failure(shard), str(error))
            part.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = error.filename or str(part)
            raise

    def _reserve(self, fd: int, num_bytes: int) -> None:
        """Give a part its size, once enough of what was not used for the longest time has been removed."""
        os.ftruncate(fd, 0)  # a process that died may have left something
        deadline = time.monotonic() + 2 * self._storage.patience
        while time.monotonic() < deadline:
            with self._folder_lock():
                if self._make_room(num_bytes):
                    os.ftruncate(fd, num_bytes)
                    return
            os.utime(fd)  # a sign of life
            time.sleep(_POLL)  # other downloads fill the cache: they end, and can be removed then
        raise DataError(
            f"the cache {self._settings.folder} has had no room for {num_bytes:,} bytes in "
            f"{2 * self._storage.patience:g} s: downloads under way fill it. Set data.remote.cache_gb higher, or "
            "data.remote.connections lower."
        )

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        with _lockable(self._settings.folder / ".lock", os.O_CREAT) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield

    def _make_room(self, num_bytes: int) -> bool:
        """Whether `num_bytes` more fit, after removing what may be removed."""
        sizes: dict[Path, int] = {}
        last_used: dict[Path, int] = {}
        for path in self._settings.folder.iterdir():
            with suppress(FileNotFoundError):  # a download failed meanwhile
                if path.suffix == ".part" and _removed_unless_locked(path):
                    continue  # left by a process that died
                if path.suffix in (".part", ".tar"):
                    stat = path.stat()
                    sizes[path], last_used[path] = stat.st_size, stat.st_mtime_ns
        excess = sum(sizes.values()) + num_bytes - self._settings.max_bytes
        shards = sorted((path for path in sizes if path.suffix == ".tar"), key=last_used.__getitem__)
        # Those in use go last: they stay readable, and the disk gets their bytes back when they are closed.
        for remove in (_removed_unless_locked, _removed):
            for path in shards:
                with suppress(FileNotFoundError):
                    if excess > 0 and remove(path):
                        excess -= sizes[path]
        return excess <= 0


@dataclass
class _Process:
    """What belongs to one process: its threads, their wishes, and the downloads under way."""

    pid: int = field(default_factory=os.getpid)
    changed: threading.Condition = field(default_factory=threading.Condition)
    wishes: deque[Shard] = field(default_factory=deque)
    running: dict[str, Future[None]] = field(default_factory=dict)  # by sha256
    num_threads: int = 0
    closed: bool = False


_lockables: set[int] = set()  # the descriptors of this process that a forked child must not keep locked


def _forget_lockables() -> None:
    for fd in _lockables:
        os.close(fd)
    _lockables.clear()


os.register_at_fork(after_in_child=_forget_lockables)


@contextmanager
def _lockable(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor of `path` to take an exclusive lock with; unlocked and closed in the end."""
    fd = os.open(path, os.O_RDWR | flags, 0o644)
    _lockables.add(fd)
    try:
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked this very moment may still have it open
        _lockables.discard(fd)
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _removed_unless_locked(path: Path) -> bool:
    """Removes a file that no process reads or fetches; whether it did."""
    with _lockable(path) as fd:
        return _try_lock(fd) and _is_same_file(fd, path) and _removed(path)


def _removed(path: Path) -> bool:
    path.unlink()
    return True


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
