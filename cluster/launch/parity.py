"""Is it the same program everywhere? What a driver and its workers must have in common, and where they differ."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "deepspeed", "ray", "numpy", "webdataset", "safetensors", "pydantic", "omegaconf")
_OURS = ("data_pipeline", "trainer", "evaluation", "cluster")
CODE = "this project's code"


def environment() -> dict[str, str]:
    """Versions by name, as they are on this machine's disk now: an edit of the code that all share is no skew.

    Of a package's version its public part: a GPU node has another build than a login node.
    """
    return {"python": platform.python_version(), CODE: _code_hash(), **_packages()}


@lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def skew(driver: Mapping[str, str], worker: Mapping[str, str], where: str) -> str | None:
    """What differs on a worker, as a message with its remedy; None where nothing does."""
    names = [name for name in driver if worker.get(name) != driver[name]]
    if not names:
        return None
    differing = ", ".join(f"{name} {worker.get(name, 'missing')} (the driver has {driver[name]})" for name in names)
    return (
        f"the environment of {where} differs from the driver's: {differing}. Results of different versions are not "
        "to be mixed: install the same there (constraints.txt), submit the code with the job, or allow it with "
        "cluster.allow_skew=true."
    )


def _code_hash() -> str:
    """Of every Python file of the project, by name and content."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for package in _OURS for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
