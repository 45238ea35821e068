"""Brings a mirror's run or study folder back to a disk: verified, never over what is newer here, going on where an
interrupted pull ended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import file_entry, fsync_file, held, write_atomic
from trainer.mirror_files import (
    MANIFEST,
    Cursor,
    Part,
    file_mark,
    in_use,
    is_growing,
    manifest_entries,
    number,
    parts_of,
)
from trainer.mirror_store import MirrorStore, MissingError, Stored

_NUM_THREADS = 4  # files at a time
_SMALL = 32 << 20  # bytes that are held in memory at a time by each
_NUM_DOWNLOADS = 2  # of a file that arrives damaged


class Pull:
    """One mirror and the folder it is brought to. Errors of the storage are StorageErrors; the next pass then goes on.

    `advance` hears of bytes received.
    """

    def __init__(
        self, store: MirrorStore, folder: Path, cursor: Cursor,
        *, advance: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:  # fmt: skip
        self.store, self.folder, self.cursor, self.advance = store, folder, cursor, advance
        self.skipped: list[str] = []  # what was not brought, of the last pass, and why
        self._there: dict[str, Stored] = {}

    def one_pass(self) -> None:
        """Bring all that is missing or older here.

        Raises UserError where there is nothing, or another run or a process at work in the folder.
        """
        self.skipped = []
        parts = self._look()
        root = parts.pop("")
        lock = "run.lock" if root.identity in root.plain else "study.lock"
        try:
            with held(self.folder / lock, in_use(self.folder, "is in use")):
                for part in parts.values():
                    run = self.folder / part.prefix
                    with held(run / "run.lock", in_use(run, "is in use")):
                        self._pull_part(part)
                self._pull_part(root)  # last: a study's own files tell of its trials
        finally:
            self.cursor.save()

    def num_bytes(self) -> int:
        """What a pass would bring. Raises as `one_pass`."""
        total = 0
        for part in self._look().values():
            total += sum(self._there[name].size for name in part.plain if not self._is_current(name))
            for folder in part.complete:
                if not self._path(f"{folder}/{MANIFEST}").exists():
                    total += sum(self._there[name].size for name in part.sealed[folder])
        return total

    def _look(self) -> dict[str, Part]:
        """List the mirror, and see that the folder is one for it."""
        self._there = self.store.list()
        parts = parts_of(self._there)
        if parts == {"": Part("")}:
            raise UserError(f"{self.store} holds no run and no study. Check the address.")
        is_run = "run.json" in parts[""].plain
        run_here, study_here = (self.folder / "run.json").exists(), (self.folder / "trials").is_dir()
        if is_run != run_here and (run_here or study_here):
            kinds = ("a run", "a study") if is_run else ("a study", "a run")
            raise UserError(f"{self.store} holds {kinds[0]}, {self.folder} {kinds[1]}; choose another folder.")
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for problem in pool.map(self._problem_of_identity, parts.values()):
                if problem:
                    raise UserError(problem)
        return parts

    def _problem_of_identity(self, part: Part) -> str | None:
        here = self._path(part.identity)
        if part.identity not in part.plain or not here.exists() or self._is_current(part.identity):
            return None
        ids = []
        for content in (here.read_bytes(), self.store.read(part.identity)):
            try:
                ids.append(json.loads(content)["id"])
            except (ValueError, KeyError, TypeError):
                return f"{part.identity} is damaged in {self.folder} or in {self.store}: restore or remove it."
        if ids[0] == ids[1]:
            return None
        return (
            f"{here.parent} holds another run than {self.store}/{part.prefix} (the ids in run.json differ); choose "
            "another folder, or move it away."
        )

    def _pull_part(self, part: Part) -> None:
        """The id first: without its checkpoints a run does not start afresh. What proves something comes last."""
        ahead = self._is_ahead(part)
        self._pull_plain({part.identity} & part.plain, ahead)
        if ahead:  # a segment of records that the mirror lacks would replace what its later ones say
            for path in (self.folder / part.prefix).glob("metrics.*.jsonl"):
                if f"{part.prefix}{path.name}" not in part.plain:
                    self._set_aside(path, "aside")
        self._pull_plain(part.early, ahead)
        for folder in sorted(part.sealed, key=lambda folder: (-int(number(folder)), folder)):
            try:
                problem = self._pull_sealed(folder, part.sealed[folder])
            except MissingError:
                problem = "it was removed meanwhile, or is not complete"
            if problem:
                self.skipped.append(f"{folder}: {problem}")
        self._pull_plain(part.late, ahead)

    def _is_ahead(self, part: Part) -> bool:
        """Whether the run went on elsewhere: the mirror has a newer checkpoint than the folder."""
        checkpoints = f"{part.prefix}checkpoints"
        there = [int(number(folder)) for folder in part.complete if folder.startswith(checkpoints)]
        here = [int(path.parent.name) for path in self._path(checkpoints).glob(f"*/{MANIFEST}")
                if path.parent.name.isdigit()]  # fmt: skip
        return max(there, default=-1) > max(here, default=-1)

    def _set_aside(self, path: Path, suffix: str) -> None:
        """Keep what must make room under a name that no longer counts."""
        names = (path.with_name(f"{path.name}.{suffix}{n}") for n in ("", *range(2, 1000)))
        other = next(name for name in names if not name.exists())
        path.rename(other)
        self.skipped.append(f"{path.relative_to(self.folder)}: what was here is kept as {other.name}")

    def _path(self, name: str) -> Path:
        return self.folder / name

    # ---- checkpoints and exports --------------------------------------------------------------------------------

    def _pull_sealed(self, folder: str, names: set[str]) -> str | None:
        """Bring a folder whole; returns why it was not."""
        manifest, final = f"{folder}/{MANIFEST}", self._path(folder)
        if manifest not in names:
            return "it is not complete in the mirror (no manifest)"
        content = self.store.read(manifest)
        entries = manifest_entries(content)
        if entries is None:
            return "its manifest is damaged"
        for name, entry in entries.items():
            stored = self._there.get(f"{folder}/{name}")
            if stored is None or stored.size != entry["bytes"]:
                return f"{name} {'is missing' if stored is None else f'has {stored.size:,} bytes'} in the mirror"
        if final.exists():
            there = final / MANIFEST
            same = there.exists() and there.read_bytes() == content
            if same and all(_has_size(final / name, entry) for name, entry in entries.items()):
                self.cursor.note(manifest, file_mark(there))
                return None
            from trainer.checkpoint import verify  # here, as it brings torch and DeepSpeed

            if verify(final) is None:
                return "another of this name is here, and was kept"
        temporary = final.with_name(f".{final.name}.tmp")
        problem = self._fill(temporary, folder, entries)
        if problem:
            shutil.rmtree(temporary, ignore_errors=True)
            return problem
        write_atomic(temporary / MANIFEST, content)
        if final.exists():
            self._set_aside(final, "damaged")
        temporary.rename(final)
        fsync_file(final.parent)
        self.cursor.note(manifest, file_mark(final / MANIFEST))
        return None

    def _fill(self, temporary: Path, folder: str, entries: dict[str, dict[str, Any]]) -> str | None:
        """Bring a folder's files, but for the manifest; those of an interrupted pull are gone on with."""
        if temporary.exists() and not entries.keys() >= {path.name for path in temporary.iterdir()}:
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True, exist_ok=True)

        def bring(name: str) -> bool:
            source, path = f"{folder}/{name}", temporary / name
            return any(self._download(source, path, entries[name]) for _ in range(_NUM_DOWNLOADS))

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for name, is_whole in zip(entries, pool.map(bring, entries), strict=True):
                if not is_whole:
                    return f"{name} is damaged in the mirror (it does not match its checksum)"
        return None

    def _download(self, name: str, path: Path, entry: dict[str, Any]) -> bool:
        """Bring the rest of a file; returns whether the whole is what the manifest says, else it is removed."""
        with open(path, "ab") as file:
            for block in self.store.blocks(name, file.tell(), entry["bytes"]):
                file.write(block)
                self.advance(len(block))
            file.flush()
            os.fsync(file.fileno())
        if file_entry(path) == entry:
            return True
        path.unlink()
        return False

    # ---- plain files --------------------------------------------------------------------------------------------

    def _is_current(self, name: str) -> bool:
        """Whether the file here is the one that was brought from the mirror, and the mirror's is still the same."""
        path, stamp = self._path(name), self._there[name].stamp
        if not path.exists() or not stamp or self.cursor.stamps.get(name) != stamp:
            return False
        return self.cursor.marks.get(name) == file_mark(path)

    def _pull_plain(self, names: Iterable[str], ahead: bool) -> None:
        wanted = [name for name in names if not self._is_current(name)]
        small = [name for name in wanted if self._there[name].size <= _SMALL]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for _ in pool.map(lambda name: self._pull_file(name, ahead), small):
                pass
        for name in sorted(set(wanted) - set(small)):
            self._pull_file(name, ahead)

    def _pull_file(self, name: str, ahead: bool) -> None:
        path = self._path(name)
        try:
            content = self.store.read(name)
        except MissingError:
            return  # removed by the run that is still at work
        self.advance(len(content))
        if name.endswith(".jsonl"):
            content = content[: content.rfind(b"\n") + 1]  # the rest is of a line that was being written
        here = path.read_bytes() if path.exists() else None
        if here is not None and here != content and not self._may_replace(name, here, content):
            if is_growing(name) and here.startswith(content):
                return  # here it is longer
            if not ahead:
                self.skipped.append(f"{name}: what is here differs from the mirror's, and was kept")
                return
            self._set_aside(path, "aside")
        if here != content:
            write_atomic(path, content)
        self.cursor.note(name, file_mark(path), self._there[name].stamp)

    def _may_replace(self, name: str, here: bytes, content: bytes) -> bool:
        """Whether nothing is lost: the file is as the mirror once had it, or the beginning of the mirror's."""
        if self.cursor.marks.get(name) == file_mark(self._path(name)):
            return True
        return is_growing(name) and content.startswith(here)


def _has_size(path: Path, entry: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == entry["bytes"]
