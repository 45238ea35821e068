"""Sends single files of a folder to its mirror, and knows which of them the mirror has as they are now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.files import file_entry
from trainer.mirror_files import Cursor, file_mark, is_growing
from trainer.mirror_store import MirrorStore, Stored

_NUM_THREADS = 4  # for small files
_SMALL = 32 << 20  # bytes that are held in memory at a time by each
_SECONDS_PER_BYTE = 20e-6  # at least between two sendings of a growing file: 20 s a megabyte
_TRIES = 3  # to read a file that is being written


class Sender:
    """The traffic from a folder to its mirror. Errors of the storage are StorageErrors.

    `advance` hears of bytes sent, `say` of what is left out.
    """

    def __init__(
        self, folder: Path, store: MirrorStore, cursor: Cursor,
        *, advance: Callable[[int], object], say: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.folder, self.store, self.cursor = folder, store, cursor
        self.there: dict[str, Stored] = {}  # what the mirror has
        self.num_incomplete = 0  # files and folders that could not be read whole
        self._advance, self._say = advance, say
        self._sent_at: dict[str, float] = {}  # growing files
        self._said: set[str] = set()

    def path(self, name: str) -> Path:
        return self.folder / name

    def lacks(self, name: str) -> bool:
        """Whether the mirror has not the file as it is now."""
        try:
            now = file_mark(self.path(name))
        except FileNotFoundError:
            return False
        stored = self.there.get(name)
        return self.cursor.marks.get(name) != now or stored is None or stored.size != now[0]

    def send(self, names: Iterable[str], *, everything: bool) -> None:
        """Send plain files that changed; `everything`: growing ones too, however short ago they were sent."""
        changed = [name for name in names if self.lacks(name) and (everything or self._is_due(name))]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for _ in pool.map(self._send_plain, changed):
                pass

    def send_listed(self, name: str, entry: dict[str, object]) -> str | None:
        """Send a file that a manifest lists, unless that was done before; returns what is wrong with it.

        Raises FileNotFoundError when it is gone.
        """
        path = self.path(name)
        mark = file_mark(path)
        if not self.lacks(name):
            return None
        if file_entry(path) != entry:
            return "does not match the manifest"
        self._upload(name, path)
        if file_mark(path) != mark:
            return "changed while it was sent"
        self.cursor.note(name, mark)
        return None

    def write(self, name: str, content: bytes) -> None:
        self.store.write(name, content)
        self.there[name] = Stored(len(content))

    def remove(self, name: str) -> None:
        """Remove a file from the mirror."""
        self.store.remove(name)
        self.there.pop(name, None)
        self.cursor.forget(name)

    def leave_out(self, name: str, why: str) -> None:
        """Count a file or folder as not mirrored, and say so once."""
        self.num_incomplete += 1
        line = f"{self.path(name)} is not mirrored: {why}"
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _is_due(self, name: str) -> bool:
        """A growing file goes as a whole, so the larger, the less often."""
        if name not in self._sent_at or not is_growing(name):
            return True
        stored = self.there.get(name, Stored(0))
        return time.monotonic() - self._sent_at[name] >= stored.size * _SECONDS_PER_BYTE

    def _send_plain(self, name: str) -> None:
        """Send a file as it was at a moment: of a growing one the beginning, others only when they hold still."""
        path = self.path(name)
        try:
            for _ in range(_TRIES):
                mark = file_mark(path)
                content = None if mark[0] > _SMALL else _beginning(path, mark[0])
                if content is None:
                    self._upload(name, path)
                if file_mark(path) == mark or (is_growing(name) and path.stat().st_size >= mark[0]):
                    break
            else:
                self.num_incomplete += 1
                return None
        except FileNotFoundError:
            return None  # it is gone
        except OSError as error:
            return self.leave_out(name, str(error))
        if content is not None:
            self.write(name, content)
            self._advance(len(content))
        self.cursor.note(name, mark)
        self._sent_at[name] = time.monotonic()
        return None

    def _upload(self, name: str, path: Path) -> None:
        """Send a large file."""
        size, sent = path.stat().st_size, 0

        def advance(num_bytes: int) -> None:
            nonlocal sent
            sent += num_bytes
            self._advance(num_bytes)

        self.store.upload(name, path, advance)
        self._advance(size - sent)  # not every storage tells
        self.there[name] = Stored(size)


def _beginning(path: Path, num_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(num_bytes)
