"""Notes on the shards that are complete, so that a killed `prepare` goes on behind the last of them.

Three files a shard: its index rows, its samples' digests and, last, `NAME.json` with the rest. A split's index,
manifest and fingerprint are put together from these notes alone, whether one run made all the shards or several did.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.files import write_atomic
from data_pipeline.index import Index
from data_pipeline.manifest import Shard
from data_pipeline.shards import WrittenShard

FORMAT = 2  # of these notes and of all that decides a shard's bytes: what another version left is not gone on with


class Entry(BaseModel):
    """What `NAME.json` says of a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    next_position: int  # in the source, behind the shard's last sample
    unreadable: list[tuple[int, str]]  # what could not be read since the shard before: position, reason
    shard: Shard


class Journal:
    """The notes on one split, whose shards lie in the folder `shards`; what else lies there is unfinished and goes."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self._folder, self._shards = folder, shards
        folder.mkdir(exist_ok=True)
        shards.mkdir(exist_ok=True)
        self.entries: list[Entry] = []
        for path in sorted(folder.glob("*.json")):
            entry = _intact(path, shards)
            if entry is None:
                break  # after a power failure, say: go on from here
            self.entries.append(entry)
        self._keep(len(self.entries))

    @property
    def next_position(self) -> int:
        """Where to go on in the source."""
        return self.entries[-1].next_position if self.entries else 0

    @property
    def num_samples(self) -> int:
        """In all shards."""
        return sum(entry.shard.num_samples for entry in self.entries)

    @property
    def unreadable(self) -> list[tuple[int, str]]:
        """What could not be read so far."""
        return [noted for entry in self.entries for noted in entry.unreadable]

    def forget_from(self, position: int) -> None:
        """Go back to before the shard that the image at `position` of the source would have been in."""
        self._keep(sum(entry.next_position <= position for entry in self.entries))

    def add(self, written: WrittenShard, next_position: int, unreadable: list[tuple[int, str]]) -> None:
        """Note the next shard."""
        stem = self._stem(written.shard)
        write_atomic(stem.with_suffix(".npz"), written.index.to_bytes())
        write_atomic(stem.with_suffix(".digests"), written.digests)
        entry = Entry(next_position=next_position, unreadable=unreadable, shard=written.shard)
        write_atomic(stem.with_suffix(".json"), entry.model_dump_json())
        self.entries.append(entry)

    def written(self) -> Iterator[WrittenShard]:
        """All shards, in order."""
        for entry in self.entries:
            stem = self._stem(entry.shard)
            with np.load(stem.with_suffix(".npz"), allow_pickle=False) as columns:
                yield WrittenShard(entry.shard, Index(**columns), stem.with_suffix(".digests").read_bytes())

    def _keep(self, count: int) -> None:
        """Keep the first `count` shards; the notes on the others go first, the last one first."""
        del self.entries[count:]
        complete = {entry.shard.file for entry in self.entries}
        stems = {self._stem(entry.shard) for entry in self.entries}
        for path in sorted(self._folder.glob("*.json"), reverse=True):
            if path.with_suffix("") not in stems:
                path.unlink()
        for path in self._shards.iterdir():
            if path.name not in complete:
                path.unlink()

    def _stem(self, shard: Shard) -> Path:
        return self._folder / Path(shard.file).stem


def _intact(path: Path, shards: Path) -> Entry | None:
    """The entry, unless it or the shard beside it is damaged."""
    try:
        entry = Entry.model_validate_json(path.read_bytes())
        num_bytes = (shards / entry.shard.file).stat().st_size
    except (ValidationError, FileNotFoundError):
        return None
    return entry if num_bytes == entry.shard.num_bytes else None
