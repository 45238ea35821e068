"""What of a run or study folder is mirrored, in which order, and what of it the mirror is known to have.

Names are paths below the folder, with slashes. Folders of images seen under those of `_SEALED_IN` are sealed: they
are complete if they hold a manifest, and change, if ever, as a whole: each call of `trainer.posthoc_ema` replaces a
folder of its own by one with more averages and another manifest. All other files are plain.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import held, write_atomic

MANIFEST = "manifest.json"
_SEALED_IN = "checkpoints|exports|ema_snapshots|posthoc_ema"
_SEALED = re.compile(rf"((?:.+/)?(?:{_SEALED_IN})/\d+)/[^/]+")
_UNDER_SEALED = re.compile(rf"(?:.+/)?(?:{_SEALED_IN})/.+")
_RUN = re.compile(r"trials/[^/]+/")
# What says that something is there or done comes after it.
_LATE = re.compile(
    r"(?:run|result|verdict|status|experiment)\.json|evals/.+\.json|evals/[^/]+\.txt|events\.jsonl|points\.csv|law/.+"
)
_WITHDRAWABLE = re.compile(r"(?:result|verdict)\.json|metrics\.\d+\.jsonl")
_SAVE_SECONDS = 5.0


def is_mirrored(name: str) -> bool:
    """All but hidden files (temporaries, cursors, chunks of evaluations), locks, profiles and what was set aside."""
    steps = name.split("/")
    if any(not step or step.startswith(".") for step in steps) or "profile" in steps[:-1]:
        return False
    if re.search(r"\.lock$|\.aside\d*$", name):
        return False
    return not _UNDER_SEALED.fullmatch(name) or _SEALED.fullmatch(name) is not None


def is_growing(name: str) -> bool:
    """Whether the file is only ever appended to, so that each beginning of it is a state it had."""
    return name.endswith((".jsonl", ".txt", ".log"))


@dataclass
class Part:
    """The files of one run, or those of a study that belong to no run."""

    prefix: str  # "trials/<trial>/", or "" for the folder itself
    sealed: dict[str, set[str]] = field(default_factory=dict)  # all names in each sealed folder
    plain: set[str] = field(default_factory=set)

    @property
    def early(self) -> list[str]:
        return sorted(name for name in self.plain if not _LATE.fullmatch(name.removeprefix(self.prefix)))

    @property
    def late(self) -> list[str]:
        return sorted(name for name in self.plain if _LATE.fullmatch(name.removeprefix(self.prefix)))

    @property
    def identity(self) -> str:
        """The file that says which run this is."""
        return f"{self.prefix}run.json"

    @property
    def complete(self) -> list[str]:
        """Sealed folders with a manifest, the newest first; of one age the checkpoint, which can make the export."""
        found = [folder for folder, names in self.sealed.items() if f"{folder}/{MANIFEST}" in names]
        return sorted(found, key=lambda folder: (-int(number(folder)), folder))

    def may_withdraw(self, name: str) -> bool:
        """Whether the run may remove this file of its, so that the mirror must, too."""
        return _WITHDRAWABLE.fullmatch(name.removeprefix(self.prefix)) is not None

    @staticmethod
    def prefix_of(name: str) -> str:
        run = _RUN.match(name)
        return run[0] if run else ""


def number(folder: str) -> str:
    """The last step of a sealed folder's name: images seen."""
    return folder.rpartition("/")[2]


def parts_of(names: Iterable[str]) -> dict[str, Part]:
    """The mirrored ones among `names`, by the parts' prefixes; the part "" is always there."""
    parts = {"": Part("")}
    for name in filter(is_mirrored, names):
        prefix = Part.prefix_of(name)
        part = parts.setdefault(prefix, Part(prefix))
        sealed = _SEALED.fullmatch(name)
        if sealed:
            part.sealed.setdefault(sealed[1], set()).add(name)
        else:
            part.plain.add(name)
    return parts


def local_names(folder: Path) -> Iterator[str]:
    """The names of all files below `folder` that are not in hidden folders."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(where).relative_to(folder).as_posix()
        yield from (name if base == "." else f"{base}/{name}" for name in files)


def manifest_entries(content: bytes) -> dict[str, dict[str, Any]] | None:
    """{"bytes": size, "sha256": digest} of each file that a manifest lists; None where it is damaged."""
    try:
        files = json.loads(content)["files"]
        if any("/" in name or name.startswith(".") for name in files):
            return None
        return {str(name): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def file_mark(path: Path) -> list[int]:
    """Changes whenever the file does: [size, mtime in ns]."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


class Cursor:
    """What a folder and one mirror of it are known to have in common, as a small hidden file in the folder."""

    def __init__(self, folder: Path, url: str) -> None:
        name = f".mirror-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        self.path, self.lock_path = folder / f"{name}.json", folder / f"{name}.lock"
        self.marks: dict[str, list[int]] = {}  # of the local files that are in the mirror as they are here
        self.stamps: dict[str, str] = {}  # the mirror's own mark of those that were pulled
        self.runs: dict[str, str] = {}  # id of the run that the mirror has, by part
        self.num_noted = 0  # moves on with every file
        self._saved, self._saving = time.monotonic(), threading.Lock()
        self._load()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's traffic with this mirror. Raises UserError when another process has it."""
        with held(self.lock_path, in_use(self.lock_path.parent, "is being pushed to or pulled from this mirror")):
            self._load()  # what the former holder left
            yield

    def note(self, name: str, mark: list[int], stamp: str | None = None) -> None:
        """The file with this mark is now the mirror's."""
        self.marks[name] = mark
        self.stamps.pop(name, None)
        if stamp is not None:
            self.stamps[name] = stamp
        self.num_noted += 1
        with self._saving:  # files are sent and brought by several threads
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self.save()

    def forget(self, name: str) -> None:
        self.marks.pop(name, None)
        self.stamps.pop(name, None)

    def save(self) -> None:
        value = {"marks": dict(self.marks), "stamps": dict(self.stamps), "runs": self.runs}
        write_atomic(self.path, json.dumps(value) + "\n")
        self._saved = time.monotonic()

    def _load(self) -> None:
        try:
            value = json.loads(self.path.read_text())
            self.marks, self.stamps, self.runs = (dict(value[key]) for key in ("marks", "stamps", "runs"))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # all is looked at again


def in_use(folder: Path, use: str) -> Callable[[str], UserError]:
    """The refusal of a folder that another process has."""
    return lambda holder: UserError(f"{folder} {use} by {holder}. Wait for it, or stop it.")
