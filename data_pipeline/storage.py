"""Folders of files behind a URL (S3, GCS, HTTP, ...): read in blocks, with patience, and never longer than that.

All protocols are fsspec's. Credentials, endpoints and proxies are not ours to keep: they come from the environment
(`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `GOOGLE_APPLICATION_CREDENTIALS`, ...) and from fsspec's configuration
(`FSSPEC_S3_ENDPOINT_URL=http://...`, `FSSPEC_S3='{"anon": true}'` for a public bucket,
`FSSPEC_HTTPS='{"headers": {"Authorization": "Bearer ..."}}'`, files in ~/.config/fsspec).
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from data_pipeline.errors import DataError

DEFAULT_PATIENCE = 60.0  # seconds
NUM_WHOLE_DOWNLOADS = 3  # of a file that arrives with the wrong checksum
_BLOCK = 4 << 20  # bytes of one range request, where every block is a request
_HTTP_BLOCK = 1 << 18  # bytes taken at a time from a connection that sends the whole rest
_NUM_HEADS = 64  # questions for a file's size at a time
_FIRST_DELAY = 0.25  # seconds before the second attempt; doubles with every further one
_RETRIED = (408, 425, 429)  # the HTTP errors below 500 that mean "later"
_JITTER = random.SystemRandom()  # shared by no processes, and no seed of ours is touched

T = TypeVar("T", bound=Sized)


def is_url(place: str | Path) -> bool:
    """Whether `place` is a URL (`s3://...`, `gs://...`, `https://...`, any other protocol) and not a path."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:_-]+://", place) is not None


class Storage:
    """A folder of files at a URL. May be used by several threads, after a fork, and sent to other processes.

    A failed request is made again after a growing, random delay, and goes on where the last one broke off.
    `patience` is the time in seconds without anything new, over all attempts, after which that ends.
    """

    def __init__(self, url: str, *, patience: float = DEFAULT_PATIENCE) -> None:
        assert patience > 0
        self.url = url.rstrip("/")
        self.patience = patience
        # A silent connection is given up in time for others: a new one often helps at once.
        self._silence = patience / 3

    def __str__(self) -> str:
        return re.sub(r"//[^/@]*@", "//***@", self.url)  # a password is nobody's business

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """The sizes of files in bytes, None for those that are missing.

        The folder is listed (on S3: a request for 1,000 files); over HTTP, and where listing is not allowed, every
        file is asked for, many at a time.

        Raises:
            DataError: the storage refuses or does not answer.
        """
        if not self._is_http():
            try:
                found: dict[str, int] = {}
                for page in self._persistent(str(self), lambda _: self._listing(), self.patience):
                    found.update(page)
                return {name: found.get(name) for name in names}
            except DataError as error:
                if not isinstance(error.__cause__, PermissionError):
                    raise
        pages = self._persistent(str(self), lambda done: self._heads(names[done:]), self._silence)
        return dict(zip(names, (size for page in pages for size in page), strict=True))

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            DataError: it is missing, or the storage refuses or does not answer.
        """
        return b"".join(self._content(name, None))

    def download(self, name: str, file: IO[bytes], *, num_bytes: int, sha256: str) -> None:
        """Fill the open `file` with a file of known size and checksum, block by block; fsynced on return.

        Raises:
            DataError: it is missing, or arrives damaged time and again, or the storage refuses or does not answer.
            OSError: `file` cannot be written (the disk is full).
        """
        sums = []
        for _ in range(NUM_WHOLE_DOWNLOADS):
            file.seek(0)
            digest = hashlib.sha256()
            with closing(self._content(name, num_bytes)) as blocks:
                for block in blocks:
                    file.write(block)
                    digest.update(block)
            if digest.hexdigest() == sha256:
                file.flush()
                os.fsync(file.fileno())
                return
            sums.append(digest.hexdigest())
        raise DataError(
            f"{self}/{name} arrives damaged: its sha256 is {' and then '.join(dict.fromkeys(sums))} in "
            f"{NUM_WHOLE_DOWNLOADS} downloads, the manifest says {sha256}. Upload the file anew, with its manifest."
        )

    def _content(self, name: str, num_bytes: int | None) -> Generator[bytes, None, None]:
        return self._persistent(f"{self}/{name}", lambda start: self._blocks(name, start, num_bytes), self._silence)

    def _persistent(self, what: str, begin: Callable[[int], Iterator[T]], silence: float) -> Generator[T, None, None]:
        """The items of `begin(0)`; after a failure those of `begin(n)`, n being the length of all items so far."""
        length = num_failures = 0
        last_new = time.monotonic()
        while True:
            try:
                for item in _watched(begin(length), silence):
                    if len(item) > 0:
                        length += len(item)
                        num_failures, last_new = 0, time.monotonic()
                    yield item
                return
            except _Failure as failure:
                error = failure.error
            num_failures += 1
            if _is_refusal(error):
                raise DataError(f"{what} cannot be read: {_answer(error)}. {_remedy(error)}") from error
            waited = time.monotonic() - last_new
            if waited >= self.patience:
                raise DataError(
                    f"{what} cannot be read: nothing new came in {waited:.0f} s and {num_failures} attempts "
                    f"(data.remote.patience is {self.patience:g}); the last answer: {_answer(error)}. Check the "
                    "network and the server and run the same command again, or set data.remote.patience higher."
                ) from error
            delay = min(_FIRST_DELAY * 2 ** min(num_failures - 1, 10), self.patience / 8)
            time.sleep(delay * _JITTER.uniform(0.5, 1.0))

    # What follows runs in the threads of `_watched`.

    def _blocks(self, name: str, start: int, stop: int | None) -> Iterator[bytes]:
        """The bytes start .. stop - 1 of a file; an empty block is a sign of life."""
        fs, root = _filesystem(self.url, os.getpid())
        path = f"{root}/{name}"
        if self._is_http():
            yield from self._http_blocks(fs, path, start, stop)
            return
        end = fs.size(path) if stop is None else stop
        while start < end:
            block = fs.cat_file(path, start=start, end=min(start + _BLOCK, end))
            if not block:
                raise EOFError(f"it ended after {start:,} of {end:,} bytes")
            start += len(block)
            yield block

    def _http_blocks(self, fs: Any, url: str, start: int, stop: int | None) -> Iterator[bytes]:
        from fsspec.asyn import sync

        response, block = sync(fs.loop, self._http_get, fs, url, start)
        try:
            position = start if response.status == 206 else 0  # a server without ranges begins at the beginning
            while block and (stop is None or position < stop):
                yield block[max(0, start - position) : None if stop is None else stop - position]
                position += len(block)
                block = sync(fs.loop, _http_some, response, self._silence / 4)
        finally:
            fs.loop.call_soon_threadsafe(response.close)
        if stop is not None and position < stop:
            raise EOFError(f"it ended after {position:,} of {stop:,} bytes")

    async def _http_get(self, fs: Any, url: str, start: int) -> tuple[Any, bytes]:
        """The response, and its first bytes."""
        session = await fs.set_session()
        headers = {"Range": f"bytes={start}-"} if start > 0 else {}
        response = await session.get(fs.encode_url(url), **self._http_options(fs, headers))
        response.raise_for_status()
        return response, await _http_some(response, self._silence / 4)

    def _http_options(self, fs: Any, headers: dict[str, str]) -> dict[str, Any]:
        import aiohttp

        headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity", **headers}
        # Shorter than our own limit, so that the library normally ends by itself.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._silence / 2, sock_read=self._silence / 2)
        return {**fs.kwargs, "headers": headers, "timeout": timeout, "allow_redirects": True}

    def _listing(self) -> Iterator[dict[str, int]]:
        fs, root = _filesystem(self.url, os.getpid())
        with suppress(FileNotFoundError):  # object storage knows no empty folders
            yield {info["name"].rpartition("/")[2]: info["size"] for info in fs.ls(root, detail=True)}

    def _heads(self, names: Sequence[str]) -> Iterator[list[int | None]]:
        import asyncio

        from fsspec.asyn import sync

        fs, root = _filesystem(self.url, os.getpid())
        size = self._http_size if self._is_http() else _object_size

        async def page(first: int) -> list[int | None]:
            return await asyncio.gather(*(size(fs, f"{root}/{name}") for name in names[first : first + _NUM_HEADS]))

        for first in range(0, len(names), _NUM_HEADS):
            yield sync(fs.loop, page, first)

    async def _http_size(self, fs: Any, url: str) -> int | None:
        # Not fs.info: it calls every failure a missing file.
        session = await fs.set_session()
        async with session.head(fs.encode_url(url), **self._http_options(fs, {})) as response:
            if response.status in (404, 410):
                return None
            response.raise_for_status()
            if "Content-Length" not in response.headers:
                raise ValueError(f"the server does not tell the size of {url.rpartition('/')[2]}")
            return int(response.headers["Content-Length"])

    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))


async def _http_some(response: Any, seconds: float) -> bytes:
    """The next bytes of a response, collected for some `seconds` at most; none at its end.

    What came just before the connection broke is not lost: the error comes again with the next call.
    """
    parts: list[bytes] = []
    began = time.monotonic()
    try:
        while sum(map(len, parts)) < _HTTP_BLOCK and time.monotonic() - began < seconds:
            part = await response.content.readany()
            if not part:
                break
            parts.append(part)
    except Exception:
        if not parts:
            raise
    return b"".join(parts)


async def _object_size(fs: Any, path: str) -> int | None:
    try:
        return int((await fs._info(path))["size"])
    except FileNotFoundError:
        return None


@lru_cache(maxsize=16)
def _filesystem(url: str, pid: int) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the folder's path in it, for this process: its event loop dies in a fork."""
    import fsspec.core

    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, root.rstrip("/")


class _Failure(Exception):
    """Wraps what went wrong at the storage, so that a full disk on our side is never taken for it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _watched(items: Iterator[T], silence: float) -> Iterator[T]:
    """`items` as a daemon thread gets them: only that thread waits for a connection that never says anything.

    Raises:
        _Failure: getting them failed, or took more than `silence` seconds for one.
    """
    made: queue.Queue[T | Exception | None] = queue.Queue(maxsize=2)  # None: the end
    abandoned = threading.Event()

    def make() -> None:
        end = None
        try:
            for item in items:
                made.put(item)
                if abandoned.is_set():
                    return
        except Exception as error:  # whatever it is, it must reach the one who waits
            end = error
        made.put(end)

    threading.Thread(target=make, name="storage", daemon=True).start()
    try:
        while True:
            try:
                item = made.get(timeout=silence)
            except queue.Empty:
                raise _Failure(TimeoutError()) from None
            if isinstance(item, Exception):
                raise _Failure(item)
            if item is None:
                return
            yield item
    finally:
        abandoned.set()
        with suppress(queue.Empty):
            while True:  # makes room: the thread may be waiting to put something
                made.get_nowait()


def _is_refusal(error: Exception) -> bool:
    """Whether asking again would bring the same answer."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _RETRIED
    return (
        isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | TypeError)
        or (isinstance(error, OSError) and error.errno == errno.EINVAL)  # so s3fs calls an invalid request
        or str(error).startswith("Forbidden: ")  # gcsfs
        or type(error).__name__ == "NoCredentialsError"  # botocore's
    )


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of aiohttp or gcsfs."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    return None


def _answer(error: Exception) -> str:
    status = _status(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file (HTTP 404)"
    if status is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    if "Timeout" in type(error).__name__:  # the libraries' and our own
        return "it stalled: neither an answer nor bytes"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "Install what remote data needs: pip install 'diffusion-scaling[remote]'"
    if _status(error) == 416:
        return "The file is shorter than its manifest says: upload it anew."
    if isinstance(error, FileNotFoundError):
        return "Check the address, or upload it anew."
    return (
        "Check the address, and the credentials in the environment or in fsspec's configuration "
        "(AWS_..., GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_S3_ENDPOINT_URL, FSSPEC_HTTPS)."
    )
