"""The storage that a mirror lies in: any of fsspec's, with errors that tell no secrets.

Credentials and endpoints come from the environment and from fsspec's configuration, see data_pipeline/storage.py.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import is_url
from trainer.tracking.uri import public_place, redact

_BLOCK = 4 << 20  # bytes of one range request
# Where an object appears with its whole content or not at all.
_ATOMIC = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^@\s]*@")  # keys may hold slashes
_SECRET_NAME = re.compile(r"secret|token|password|key", re.IGNORECASE)
_SIGNATURE = re.compile(r"((?:X-Amz-[A-Za-z-]+|Signature|sig|token)=)[^&\s\"']+", re.IGNORECASE)


class StorageError(Exception):
    """The storage refused or did not answer. Its text holds no credentials."""


class MissingError(StorageError):
    """There is no such file in the mirror (any more)."""


@dataclass(frozen=True)
class Stored:
    """A file in the mirror."""

    size: int  # bytes
    stamp: str = ""  # what the storage says of its version


def url_problem(url: str) -> str | None:
    """What is wrong with the address of a mirror, else None."""
    if not is_url(url):
        return "a mirror is a URL, such as s3://bucket/folder, gs://bucket/folder or file:///folder"
    if url.startswith(("http://", "https://")):
        return "a mirror must be listed and written, which HTTP cannot; give an s3://, gs:// or file:// address"
    if _PASSWORD.search(url):
        return "an address with a password would be stored and seen; give credentials by the environment (AWS_...)"
    return None


class MirrorStore:
    """A folder of files at a URL. All methods raise StorageError."""

    def __init__(self, url: str) -> None:
        """Raises UserError for an address that cannot be a mirror's, and where a package is missing."""
        problem = url_problem(url)
        if problem:
            raise UserError(f"{shown(url)}: {problem}.")
        self.url = url.rstrip("/")
        try:
            import fsspec.core

            self._fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = "gcs" if url.startswith(("gs:", "gcs:")) else "remote"
            raise UserError(
                f"{self} needs a package that is not installed ({error}): pip install 'diffusion-scaling[{extra}]'"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{self}: {redact_secrets(str(error))}. Known are s3://, gs://, file:// and others."
            ) from None
        self._root: str = root.rstrip("/")
        protocol = self._fs.protocol
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        self._is_atomic = any(name in _ATOMIC for name in protocols)
        self.local_root = Path(self._root) if "file" in protocols else None

    def __str__(self) -> str:
        return shown(self.url)

    def list(self) -> dict[str, Stored]:
        """All files by their names."""
        with self._asking("listed"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:  # object storage knows no empty folders
                return {}
            start = len(self._root) + 1
            return {
                path[start:]: Stored(int(info["size"]), _stamp(info))
                for path, info in found.items()
                if path.startswith(f"{self._root}/")
            }

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises MissingError where there is none."""
        with self._asking(f"read ({name})"):
            content: bytes = self._fs.cat_file(self._path(name))
            return content

    def blocks(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes start .. stop - 1 of a file, block by block. Raises MissingError where there is none."""
        while start < stop:
            with self._asking(f"read ({name})"):
                block: bytes = self._fs.cat_file(self._path(name), start=start, end=min(start + _BLOCK, stop))
                if not block:
                    raise EOFError(f"it ended after {start:,} of {stop:,} bytes")
            start += len(block)
            yield block

    def write(self, name: str, content: bytes) -> None:
        """Make a small file, or replace it, at once."""
        with self._asking(f"written ({name})"), self._appearing(name) as path:
            self._fs.pipe_file(path, content)

    def upload(self, name: str, path: Path, advance: Callable[[int], object]) -> None:
        """Make or replace a file by a local one; `advance` hears of the bytes sent.

        Raises FileNotFoundError when the local file is gone.
        """
        from fsspec.callbacks import Callback

        class Advance(Callback):
            def relative_update(self, inc: int = 1) -> None:
                advance(inc)

        try:
            with self._asking(f"written ({name})"), self._appearing(name) as target:
                self._fs.put_file(str(path), target, callback=Advance())
        except StorageError:
            path.stat()
            raise

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._asking(f"removed ({name})"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _appearing(self, name: str) -> Iterator[str]:
        """Where to write a file so that it appears whole: file systems show what is only half written."""
        path = self._path(name)
        if self._is_atomic:
            yield path
            return
        folder, _, last = path.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            yield temporary
            self._fs.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = redact_secrets(" ".join(str(error).split()))[:300]
            message = f"{self} cannot be {what}: {type(error).__name__}: {text}"
            kind = MissingError if isinstance(error, FileNotFoundError) else StorageError
            raise kind(message) from None


def redact_secrets(text: str) -> str:
    """`text` without the credentials that the environment and fsspec's configuration hold, and without signatures."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    with suppress(ImportError):
        from fsspec.config import conf

        values |= {v for part in conf.values() if isinstance(part, dict) for v in _secrets(part)}
    for value in sorted((v for v in values if len(v) > 3), key=len, reverse=True):
        text = text.replace(value, "***")
    return _SIGNATURE.sub(r"\1***", redact(_PASSWORD.sub("***@", text)))


def _secrets(tree: dict[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _secrets(value)
        elif isinstance(value, str) and _SECRET_NAME.search(key):
            yield value


def shown(url: str) -> str:
    """The address without user name, password and query."""
    return public_place(_PASSWORD.sub("", url.rstrip("/")))


def _stamp(info: dict[str, Any]) -> str:
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")
