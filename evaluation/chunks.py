"""A job cut into fixed chunks, which any number of processes share and any later start goes on with.

What a chunk gives is a function of the job and the chunk's number alone, and results are read in order of number: so
they are the same bits whoever made which chunk, on how many processes, after how many interruptions. A process takes
the chunks whose number leaves its own remainder, and waits for those of the others; where none has come for a while
(a process that died, or has not begun) it makes them itself. The processes meet in files only: torchrun, Slurm arrays,
Ray actors and shells in a row will all do.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic
from data_pipeline.progress import progress_bar, say

Arrays = dict[str, NDArray[Any]]
Advance = Callable[[int], object]  # moves the progress bar by so many units of work
Make = Callable[[int, Advance], Arrays]  # chunk's number -> what it gives

PATIENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.2
_COUNT = "num_arrays"  # kept in a chunk's file: a damaged archive may have lost some


class FinishedElsewhere(Exception):
    """The job's result is another process's to write, or was written by it while this one worked."""


@dataclass(frozen=True)
class Shard:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1

    def own(self, num_chunks: int) -> range:
        return range(self.index, num_chunks, self.count)


def shard_of(text: str | None) -> Shard:
    """`--shard 0/2`; without it, a launcher's RANK and WORLD_SIZE; without them, the only one. Raises UserError."""
    where = f"--shard {text}"
    if text is None:
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        text, where = f"{rank}/{world_size}", f"RANK={rank} and WORLD_SIZE={world_size} in the environment"
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"{where}: a number from 0 and how many there are is expected, such as 0/2 and 1/2.")
    return Shard(int(match[1]), int(match[2]))


class Chunks:
    """The chunks of one job.

    Args:
        folder: where chunks are kept, named after all that decides them; None keeps none (one process, no resuming).
        shard: the part of this process.
        result: the file that proves the whole job done; once it is there, nothing more is made.
        patience: seconds without a chunk from the others until theirs are made here.
    """

    def __init__(
        self, folder: Path | None = None, *, shard: Shard | None = None, result: Path | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:  # fmt: skip
        self._folder, self._result, self._patience = folder, result, patience
        self.shard = shard or Shard()
        self._absent: set[int] = set()  # processes that brought nothing for so long
        self._slowest = 0.0  # seconds that a chunk took here
        assert folder is not None or self.shard.count == 1, "processes meet in a folder"

    def results(
        self, kind: str, num: int, make: Make, *, work: Callable[[int], int] = lambda number: 1, unit: str = "chunk",
        title: str = "", final: bool = False,
    ) -> Iterator[Arrays]:  # fmt: skip
        """What each of `num` chunks gives, in order of number; one is in memory at a time.

        Args:
            kind: names this series of chunks in the folder.
            make: computes a chunk; it moves the bar by `work(number)` units in all.
            title: of the progress bar; no bar without one.
            final: these are the job's last: processes other than the first have done their part with their own.

        Raises FinishedElsewhere when another process has written the job's result, or will (`final`).
        """
        if self._folder is None:
            with self._bar(work, range(num), unit, title) as bar:
                for number in range(num):
                    yield make(number, bar.update)
            return
        self._make_own(self._folder / kind, num, make, work, unit, title)
        if final and self.shard.index != 0:
            raise FinishedElsewhere
        for number in range(num):
            yield self._found(self._folder / kind, number) or self._awaited(self._folder / kind, number, make)

    def remove(self) -> None:
        """Delete the chunks: the job's result holds what is wanted of them."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _bar(self, work: Callable[[int], int], numbers: range, unit: str, title: str) -> Any:
        return progress_bar(total=sum(map(work, numbers)), unit=unit, description=title, disable=not title)

    def _make_own(self, folder: Path, num: int, make: Make, work: Callable[[int], int], unit: str, title: str) -> None:
        own = self.shard.own(num)
        with self._bar(work, own, unit, title) as bar:
            for number in own:
                if self._found(folder, number) is None:
                    self._make(folder, number, make, bar.update)
                else:
                    bar.update(work(number))

    def _make(self, folder: Path, number: int, make: Make, advance: Advance) -> Arrays:
        if self._finished():
            raise FinishedElsewhere
        began = time.monotonic()
        arrays = make(number, advance)
        self._slowest = max(self._slowest, time.monotonic() - began)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **{_COUNT: np.int64(len(arrays))})  # type: ignore[arg-type]
        write_atomic(_path(folder, number), buffer.getvalue())
        if self._finished():  # whoever wrote the result has removed the chunks
            self.remove()
            raise FinishedElsewhere
        return arrays

    def _found(self, folder: Path, number: int) -> Arrays | None:
        """A chunk that is there; None for one that is not, or is damaged in whatever way."""
        try:
            with np.load(_path(folder, number), allow_pickle=False) as file:
                arrays = dict(file)
            return arrays if int(arrays.pop(_COUNT)) == len(arrays) else None
        except PermissionError:
            raise
        except Exception:  # a damaged archive has many ways to say so
            return None

    def _awaited(self, folder: Path, number: int, make: Make) -> Arrays:
        owner = number % self.shard.count
        there, since = _num_there(folder), time.monotonic()
        while (arrays := self._found(folder, number)) is None:
            if self._finished():
                raise FinishedElsewhere
            patience = max(self._patience, 3 * self._slowest)  # others may be at one that takes its time
            if owner in self._absent or time.monotonic() - since > patience:
                if owner not in self._absent:
                    say(f"part {owner} of {self.shard.count} has brought nothing for {patience:.0f} s: made here.")
                self._absent.add(owner)
                return self._make(folder, number, make, lambda units: None)
            time.sleep(_LOOK_SECONDS)
            if (now_there := _num_there(folder)) > there:
                there, since = now_there, time.monotonic()
        return arrays

    def _finished(self) -> bool:
        return self._result is not None and self._result.exists()


def cut(total: int, size: int) -> list[slice]:
    """`total` things in chunks of `size`: fixed, so that nothing depends on who makes them."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def concatenated(parts: Iterator[Arrays]) -> Arrays:
    """The chunks' arrays one after the other, by name; for what fits in memory."""
    lists: dict[str, list[NDArray[Any]]] = {}
    for part in parts:
        for name, array in part.items():
            lists.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in lists.items()}


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _num_there(folder: Path) -> int:
    try:
        return len(os.listdir(folder))
    except FileNotFoundError:
        return 0
