"""The files of a data split, wherever they lie: the same few questions to a folder and to a URL."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file, write_atomic
from data_pipeline.index import FILE_NAME as INDEX_FILE
from data_pipeline.manifest import FILE_NAME as MANIFEST_FILE
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.storage import is_url

if TYPE_CHECKING:
    from data_pipeline.shard_cache import CacheSettings


class ShardFiles(Protocol):
    """A folder of shards, with the manifest and index of the split."""

    @property
    def max_bytes(self) -> float:
        """What may lie on the local disk at a time."""
        ...

    def manifest(self) -> Manifest:
        """Raises DataError where there is no valid one."""
        ...

    def index(self, described: Manifest) -> Path:
        """A local file with the content of the index; whether it is the right one is the caller's to check."""
        ...

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """The bytes of each file; None where it is missing."""
        ...

    def open(self, shard: Shard) -> int:
        """A file descriptor of the complete shard, for reading; the caller closes it."""
        ...

    def drop_bad_copy(self, shard: Shard) -> bool:
        """Remove the local copy of a shard that lies elsewhere if it is damaged; whether it was."""
        ...

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Say which shards will be opened next, in this order; replaces what was said before."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class LocalFiles:
    """A split in a folder."""

    max_bytes = math.inf

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def manifest(self) -> Manifest:
        from data_pipeline.adopt import adopt_on_first_sight

        adopt_on_first_sight(self._folder)
        return Manifest.load(self._folder)

    def index(self, described: Manifest) -> Path:
        return self._folder / INDEX_FILE

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(names)
        with os.scandir(self._folder) as entries:  # one listing: network file systems answer it faster than each name
            for entry in entries:
                if entry.name in found:
                    with suppress(FileNotFoundError):  # a link to nothing
                        found[entry.name] = entry.stat().st_size
        return found

    def open(self, shard: Shard) -> int:
        return os.open(self._folder / shard.file, os.O_RDONLY)

    def drop_bad_copy(self, shard: Shard) -> bool:
        return False

    def prefetch(self, shards: Sequence[Shard]) -> None:
        pass  # the operating system reads ahead

    def close(self) -> None:
        pass


class RemoteFiles:
    """A split at a URL; shards and index are kept in a bounded cache on the local disk."""

    def __init__(self, url: str, settings: CacheSettings) -> None:
        from data_pipeline.shard_cache import ShardCache
        from data_pipeline.storage import Storage

        self._url, self._settings = url, settings
        self._storage = Storage(url, patience=settings.patience)
        self._cache = ShardCache(self._storage, settings)

    @property
    def max_bytes(self) -> float:
        return self._settings.max_bytes

    def manifest(self) -> Manifest:
        return Manifest.parse(self._storage.read(MANIFEST_FILE), self._url)

    def index(self, described: Manifest) -> Path:
        path = self._settings.folder / f"{described.index_sha256}.{INDEX_FILE}"
        if not path.exists() or sha256_file(path) != described.index_sha256:
            content = self._storage.read(INDEX_FILE)
            if hashlib.sha256(content).hexdigest() != described.index_sha256:
                raise DataError(
                    f"{self._storage}/{INDEX_FILE} is damaged, or not the one that {MANIFEST_FILE} beside it was "
                    "written with: upload both anew."
                )
            write_atomic(path, content)
        return path

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        return self._storage.sizes(names)

    def open(self, shard: Shard) -> int:
        return self._cache.open(shard)

    def drop_bad_copy(self, shard: Shard) -> bool:
        copy = self._cache.path(shard)
        try:
            is_bad = sha256_file(copy) != shard.sha256
        except FileNotFoundError:
            return True  # another process was faster
        if is_bad:
            copy.unlink(missing_ok=True)
        return is_bad

    def prefetch(self, shards: Sequence[Shard]) -> None:
        self._cache.prefetch(shards)

    def close(self) -> None:
        self._cache.close()


def read_manifest(place: str | Path) -> Manifest:
    """The manifest of the split at a folder or URL. Raises DataError where there is none."""
    return open_files(place, None).manifest()


def open_files(place: str | Path, cache: CacheSettings | None) -> ShardFiles:
    """The files at a folder or URL; `cache` is where those of a URL are kept (None: the default place)."""
    if not is_url(place):
        return LocalFiles(Path(place))
    from data_pipeline.shard_cache import CacheSettings

    return RemoteFiles(str(place), cache or CacheSettings())
