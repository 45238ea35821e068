"""Weights files that no package brings: downloaded once, checked, and kept in the user's cache folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.sources.fetch import FetchError, check_archive, fetch_url


def cache_folder() -> Path:
    """Where downloaded weights are kept: in the home folder, for all working copies and jobs of a user."""
    return Path.home() / ".cache" / "diffusion-scaling"


def cached_download(url: str, *, sha256: str, what: str) -> Path:
    """The file of `url` in the cache folder; fetched, with a progress bar, where it is not there yet.

    Processes that start together wait for one download. The file appears whole and checked, or not at all.

    Raises:
        UserError: it cannot be had, or is another file; says where `what` comes from and which flag takes it.
    """
    path = cache_folder() / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():  # another process was faster
            return path
        print(f"{what}: downloading {url}", flush=True)
        try:
            fetch_url(url, part)
            check_archive(part, sha256)
        except FetchError as error:
            raise UserError(
                f"{what} could not be downloaded: {url}: {error}.\n"
                "Get the file on a machine that can reach it, and pass it with --feature-weights FILE, or put it at "
                f"{path}."
            ) from error
        os.replace(part, path)
    return path
