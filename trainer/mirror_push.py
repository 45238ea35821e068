"""Sends what is new in a run or study folder to its mirror, so that the mirror, too, is a folder to go on from at any
moment: a checkpoint is complete there or not at all, and what says that something is done comes after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from data_pipeline.errors import UserError
from data_pipeline.files import file_entry
from trainer.mirror_files import (
    MANIFEST,
    Cursor,
    Part,
    file_mark,
    is_growing,
    local_names,
    manifest_entries,
    number,
    parts_of,
)
from trainer.mirror_store import MirrorStore, StorageError, Stored

_NUM_THREADS = 4  # for small files
_SMALL = 32 << 20  # bytes that are held in memory at a time
_SECONDS_PER_BYTE = 20e-6  # at least between two sendings of a growing file: 20 s a megabyte
_TRIES = 3  # to read a file that is being written


class Push:
    """One folder and one mirror of it. Errors of the storage are StorageErrors; the next pass then goes on.

    `advance` hears of bytes sent, `say` of what is left out.
    """

    def __init__(
        self, folder: Path, store: MirrorStore, cursor: Cursor,
        *, advance: Callable[[int], object] = lambda num_bytes: None, say: Callable[[str], object] = print,
    ) -> None:  # fmt: skip
        self.folder, self.store, self.cursor = folder, store, cursor
        self.advance, self._say = advance, say
        self.refused: list[str] = []  # why runs were left out, of the last pass
        self.num_incomplete = 0  # files and folders that could not be read whole, of the last pass
        self._there: dict[str, Stored] | None = None  # what the mirror has; None: not known
        self._checked: set[str] = set()  # sealed folders that were compared with the mirror
        self._cleaned: dict[str, list[str]] = {}  # by part: the sealed folders here when old ones were removed there
        self._sent_at: dict[str, float] = {}  # growing files
        self._said: set[str] = set()

    # ---- a pass -------------------------------------------------------------------------------------------------

    def one_pass(self, *, everything: bool) -> bool:
        """Send what is new; `everything`: growing files too, however short ago they were sent.

        Returns whether the folder is a run that is finished, and all of it in the mirror.
        """
        self.refused, self.num_incomplete = [], 0
        try:
            if self._there is None:
                self._there = self.store.list()
            parts = parts_of(local_names(self.folder))
            root = parts.pop("")
            is_finished = "result.json" in root.plain
            everything = everything or is_finished
            if self._is_welcome(root):
                self._send_early(root, everything)
                for part in filter(self._is_welcome, parts.values()):
                    self._send_early(part, everything)
                    self._send_rest(part, everything)
                self._send_rest(root, everything)
        except StorageError:
            self._there = None  # who knows what has arrived
            self._checked.clear()
            raise
        finally:
            self.cursor.save()
        return is_finished and not self.refused and not self.num_incomplete

    def num_bytes(self) -> int:
        """What a pass would send."""
        there = self._there = self.store.list()
        total = 0
        for part in parts_of(local_names(self.folder)).values():
            total += sum(self._path(name).stat().st_size for name in part.plain if self._is_stale(name))
            for folder in self._unsent(part):
                entries = manifest_entries(self._path(f"{folder}/{MANIFEST}").read_bytes()) or {}
                names = {f"{folder}/{name}": entry["bytes"] for name, entry in entries.items()}
                total += sum(n for name, n in names.items() if name not in there or self._is_stale(name))
        return total

    def _send_early(self, part: Part, everything: bool) -> None:
        """Records before checkpoints: a run that goes on from the mirror's newest then misses none."""
        self._retract(part)
        self._send_plain(part.early, everything=everything or bool(self._unsent(part)))

    def _send_rest(self, part: Part, everything: bool) -> None:
        for folder in self._unsent(part):
            self._send_sealed(folder)
        self._send_plain(part.late, everything=everything)
        if self._cleaned.get(part.prefix) != part.complete:
            self._remove_old(part)
            self._cleaned[part.prefix] = part.complete

    @property
    def _listed(self) -> dict[str, Stored]:
        assert self._there is not None
        return self._there

    def _path(self, name: str) -> Path:
        return self.folder / name

    # ---- whose mirror it is -------------------------------------------------------------------------------------

    def _is_welcome(self, part: Part) -> bool:
        """Whether the mirror has no other run in this place. Where it has none, it gets the run's id, first of all."""
        if part.identity not in part.plain:
            return True
        try:
            about = json.loads(self._path(part.identity).read_bytes())
            run = str(about["id"])
        except (OSError, ValueError, KeyError, TypeError):
            self.refused.append(f"{self._path(part.identity)} is damaged: remove it, and the run gets a new id")
            return False
        if part.identity not in self._listed:
            about.pop("saved_images", None)  # that follows when a checkpoint is there
            self._write(part.identity, (json.dumps(about, indent=2) + "\n").encode())
            self.cursor.forget(part.identity)
        elif self.cursor.runs.get(part.prefix) != run and self._run_there(part) != run:
            self.refused.append(
                f"{self.store}/{part.prefix} holds another run than {self.folder / part.prefix} (the ids in run.json "
                "differ); give this one another address, or move the other away"
            )
            return False
        self.cursor.runs[part.prefix] = run
        return True

    def _run_there(self, part: Part) -> str | None:
        try:
            return str(json.loads(self.store.read(part.identity))["id"])
        except (ValueError, KeyError, TypeError):
            return None

    # ---- plain files --------------------------------------------------------------------------------------------

    def _is_stale(self, name: str) -> bool:
        """Whether the mirror lacks the file as it is now."""
        mark, stored = self.cursor.marks.get(name), self._listed.get(name)
        try:
            now = file_mark(self._path(name))
        except FileNotFoundError:
            return False
        return mark != now or stored is None or stored.size != now[0]

    def _send_plain(self, names: Iterable[str], *, everything: bool) -> None:
        stale = [name for name in names if self._is_stale(name) and (everything or self._is_due(name))]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for _ in pool.map(self._send_file, stale):
                pass

    def _is_due(self, name: str) -> bool:
        """A growing file goes as a whole, so the larger, the less often."""
        if name not in self._sent_at or not is_growing(name):
            return True
        stored = self._listed.get(name, Stored(0))
        return time.monotonic() - self._sent_at[name] >= stored.size * _SECONDS_PER_BYTE

    def _send_file(self, name: str) -> None:
        """Send a file as it was at a moment: of a growing one the beginning, others only when they hold still."""
        path = self._path(name)
        try:
            for _ in range(_TRIES):
                mark = file_mark(path)
                if mark[0] > _SMALL:
                    sent, size = True, self._upload(name, path)
                else:
                    with open(path, "rb") as file:
                        content = file.read(mark[0])
                    sent, size = False, len(content)
                grew = is_growing(name) and path.stat().st_size >= size >= mark[0]
                if file_mark(path) == mark or grew:
                    break
            else:
                self.num_incomplete += 1
                return None
        except FileNotFoundError:
            return None  # it is gone
        except OSError as error:
            return self._leave_out(name, str(error))
        if not sent:
            self._write(name, content)
            self.advance(size)
        self.cursor.note(name, mark)
        self._sent_at[name] = time.monotonic()
        return None

    def _upload(self, name: str, path: Path) -> int:
        """Send a large file; returns its size."""
        size = path.stat().st_size
        sent = 0

        def advance(num_bytes: int) -> None:
            nonlocal sent
            sent += num_bytes
            self.advance(num_bytes)

        self.store.upload(name, path, advance)
        self.advance(size - sent)
        self._listed[name] = Stored(size)
        return size

    def _write(self, name: str, content: bytes) -> None:
        self.store.write(name, content)
        self._listed[name] = Stored(len(content))

    def _retract(self, part: Part) -> None:
        """Remove what this folder sent and the run has withdrawn: a result that a larger budget made void, say."""
        if part.identity not in part.plain:
            return  # the folder as a whole may be gone: nothing follows from that
        gone = [name for name in self.cursor.marks if part.retractable(name) and not self._path(name).exists()]
        for name in gone:
            self._remove(name)
            self.cursor.forget(name)

    def _remove(self, name: str) -> None:
        self.store.remove(name)
        self._listed.pop(name, None)

    # ---- checkpoints and exports --------------------------------------------------------------------------------

    def _unsent(self, part: Part) -> list[str]:
        """The sealed folders that the mirror lacks, the newest first."""
        return [folder for folder in part.complete if not self._is_complete_there(folder)]

    def _is_complete_there(self, folder: str) -> bool:
        manifest = f"{folder}/{MANIFEST}"
        try:
            mark = file_mark(self._path(manifest))
            if manifest not in self._listed:
                return False
            if folder in self._checked and self.cursor.marks.get(manifest) == mark:
                return True
            content = self._path(manifest).read_bytes()
        except FileNotFoundError:
            return True  # removed since it was listed: nothing to send
        entries = manifest_entries(content) or {}
        sizes = {name: self._listed.get(f"{folder}/{name}", Stored(-1)).size for name in entries}
        if any(sizes[name] != entry["bytes"] for name, entry in entries.items()):
            return False
        if self.cursor.marks.get(manifest) != mark and self.store.read(manifest) != content:
            return False
        self._checked.add(folder)
        self.cursor.note(manifest, mark)
        return True

    def _send_sealed(self, folder: str) -> None:
        """File by file, the manifest last; the run may remove it meanwhile."""
        manifest = f"{folder}/{MANIFEST}"
        try:
            mark, content = file_mark(self._path(manifest)), self._path(manifest).read_bytes()
            entries = manifest_entries(content)
            if entries is None:
                return self._leave_out(folder, "its manifest is damaged")
            if manifest in self._listed:  # of another checkpoint of this name
                self._remove(manifest)
            for name, entry in entries.items():
                problem = self._send_part(f"{folder}/{name}", entry)
                if problem:
                    return self._leave_out(folder, f"{name} {problem}")
            if file_mark(self._path(manifest)) != mark:
                return self._leave_out(folder, "it changed while it was sent")
        except FileNotFoundError:
            return None  # removed by the run, which has newer ones
        except OSError as error:
            return self._leave_out(folder, str(error))
        self._write(manifest, content)
        for name in entries:
            self.cursor.forget(f"{folder}/{name}")
        self.cursor.note(manifest, mark)
        self._checked.add(folder)
        return None

    def _send_part(self, name: str, entry: dict[str, object]) -> str | None:
        """Send a file of a sealed folder, unless an earlier pass has; returns what is wrong with it."""
        path = self._path(name)
        mark = file_mark(path)
        if not self._is_stale(name):
            return None
        if file_entry(path) != entry:
            return "does not match the manifest"
        self._upload(name, path)
        if file_mark(path) != mark:
            return "changed while it was sent"
        self.cursor.note(name, mark)
        return None

    def _leave_out(self, folder: str, why: str) -> None:
        self.num_incomplete += 1
        line = f"{self._path(folder)} is not mirrored: {why}"
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _remove_old(self, part: Part) -> None:
        """Remove checkpoints that the run has removed, by its own rule, once the mirror has a newer one of its."""
        there = parts_of(name for name in self._listed if name.startswith(part.prefix)).get(part.prefix)
        if there is None:
            return
        checkpoints = f"{part.prefix}checkpoints/"
        complete = [int(number(f)) for f in there.complete if f.startswith(checkpoints)]
        here = {int(number(f)) for f in part.complete if f.startswith(checkpoints)}
        newest = max(here.intersection(complete), default=None)
        if newest is None:
            return
        stay = self._to_stay(part, complete)
        for folder, names in there.sealed.items():
            nimg = int(number(folder))
            if not folder.startswith(checkpoints) or nimg in stay or nimg >= newest or self._path(folder).exists():
                continue
            manifest = f"{folder}/{MANIFEST}"
            if manifest in names:
                self._remove(manifest)  # first: from here on it is none
            for name in sorted(names - {manifest}):
                self._remove(name)
            self.cursor.forget(manifest)

    def _to_stay(self, part: Part, complete: list[int]) -> set[int]:
        """Of the mirror's complete checkpoints, those that the run would keep: all where its config does not say."""
        try:
            train = yaml.safe_load(self._path(f"{part.prefix}config.yaml").read_text())["train"]
            keep, every = int(train["keep_checkpoints"]), train.get("keep_every_images")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            return set(complete)
        stay = set(sorted(complete, reverse=True)[:keep])
        if every:
            from trainer.checkpoint import kept_for_good  # here, as it brings torch and DeepSpeed

            stay |= kept_for_good(complete, int(every))
        return stay


def check_apart(folder: Path, store: MirrorStore) -> None:
    """Raises UserError where the mirror lies in the folder or the folder in it: it would mirror itself."""
    root, folder = store.local_root, folder.resolve()
    if root is not None and (root.resolve().is_relative_to(folder) or folder.is_relative_to(root.resolve())):
        raise UserError(f"the mirror {store} and the folder {folder} lie in each other; choose another address.")
