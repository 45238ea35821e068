"""Feature statistics of one set of images, with all that says what they may be compared to; their npz files.

A file holds `mu`, `sigma` and, for nets that give spatial features, `mu_s`, `sigma_s`: the names that pytorch-fid and
ADM's evaluator use, so their files are read here and ours are read there. Ours also say N, the net, its weights, the
resize and the data.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from evaluation.metrics.frechet import factor
from evaluation.moments import Gaussian

Array = NDArray[np.float64]

UNKNOWN = "unknown"  # hash of the weights behind another project's statistics
_IDENTITY = ("net", "weights_sha256", "resize")
_NAMES = ("mu", "sigma", "features", "mu_s", "sigma_s", "features_s", "inception_scores", "N", "data", *_IDENTITY)


@dataclass(frozen=True)
class FeatureIdentity:
    """What made the features: statistics are comparable if and only if all of it is equal."""

    net: str  # name in the registry of feature nets, such as "efflite0"
    weights_sha256: str  # UNKNOWN where a file of another project does not say
    resize: int  # side in pixels that images were resized to

    @property
    def is_foreign(self) -> bool:
        """Whether the caller vouches for the net, because the file does not name it."""
        return self.weights_sha256 == UNKNOWN


@dataclass(frozen=True)
class FeatureStats:
    """What is known of the features of one set of images as a whole."""

    identity: FeatureIdentity
    data: str  # fingerprint of the images (a data split's, or the weights that made the samples); "" if unknown
    num: int  # images; 0 where a foreign file does not say
    pool: Gaussian
    spatial: Gaussian | None = None  # for nets that give spatial features
    inception_scores: Array | None = None  # [splits], for nets that give class probabilities


def require_comparable(x: FeatureIdentity, y: FeatureIdentity) -> None:
    """Refuse statistics of different nets, weights or resizes; of a foreign file's the net alone is known.

    Raises:
        DataError: names what differs.
    """
    names = ("net",) if x.is_foreign or y.is_foreign else _IDENTITY
    differing = [f"{n} {getattr(x, n)!r} against {getattr(y, n)!r}" for n in names if getattr(x, n) != getattr(y, n)]
    if differing:
        raise DataError(
            f"these feature statistics cannot be compared: {'; '.join(differing)}. "
            "Compute both with the same feature net, weights and resize."
        )


def write_stats(path: Path, stats: FeatureStats) -> None:
    """Write an npz, atomically."""
    arrays: dict[str, Any] = {
        "mu": stats.pool.mean,
        "sigma": stats.pool.covariance,
        "features": stats.pool.vectors,
        "inception_scores": stats.inception_scores,
        "N": np.int64(stats.num),
        "data": stats.data,
        "net": stats.identity.net,
        "weights_sha256": stats.identity.weights_sha256,
        "resize": np.int64(stats.identity.resize),
    }
    if stats.spatial is not None:
        arrays |= {
            "mu_s": stats.spatial.mean,
            "sigma_s": stats.spatial.covariance,
            "features_s": stats.spatial.vectors,
        }
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    write_atomic(path, buffer.getvalue())


def read_stats(path: Path, *, identity: FeatureIdentity | None = None, data: str | None = None) -> FeatureStats:
    """Read an npz of statistics.

    Args:
        identity: what the statistics are expected to be of. Files of other projects do not say what made them: its
            net is believed of them, their weights are unknown.
        data: the expected fingerprint of the images; None accepts any.

    Raises:
        DataError: unreadable, incomplete, non-finite or impossible statistics, no identity known, or not the expected
            one; names the file.
    """
    arrays = _read_arrays(path)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(missing)}: not a file of feature statistics.")
    found = _identity(path, arrays)
    if found is None:
        if identity is None:
            raise DataError(f"{path} does not say which feature net made it: name the net to read it.")
        found = FeatureIdentity(identity.net, UNKNOWN, identity.resize)
    if identity is not None:
        require_comparable(found, identity)
    known = str(arrays.get("data", ""))
    if data is not None and known != data:
        raise DataError(f"{path} is of other images: fingerprint {known or UNKNOWN}, expected {data}.")
    pool = _gaussian(path, arrays, "mu", "sigma", "features")
    spatial = _gaussian(path, arrays, "mu_s", "sigma_s", "features_s") if {"mu_s", "sigma_s"} <= arrays.keys() else None
    scores = _checked(path, "inception_scores", arrays, ndim=1) if "inception_scores" in arrays else None
    num = _count(path, "N", arrays) if "N" in arrays else 0
    return FeatureStats(found, known, num, pool, spatial, scores)


def says_its_net(path: Path) -> str | None:
    """The feature net that a file of statistics names; None for files of other projects. Raises DataError."""
    identity = _identity(path, _read_arrays(path, _IDENTITY))
    return None if identity is None else identity.net


def _gaussian(path: Path, arrays: dict[str, NDArray[Any]], mu: str, sigma: str, vectors: str) -> Gaussian:
    mean, covariance = _checked(path, mu, arrays, ndim=1), _checked(path, sigma, arrays, ndim=2)
    if covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: {mu} {list(mean.shape)} and {sigma} {list(covariance.shape)} are not [d] and [d, d].")
    if vectors in arrays:
        kept = _checked(path, vectors, arrays, ndim=2)
        if len(kept) < 2 or kept.shape[1] != len(mean):
            raise DataError(f"{path}: {vectors} is {list(kept.shape)}, not [2 or more, {len(mean)}] as {mu} has it.")
        return Gaussian(mean, covariance, kept)
    try:
        factor(covariance)
    except DataError as error:
        raise DataError(f"{path}: {sigma}: {error}") from None
    return Gaussian(mean, covariance)


def _checked(path: Path, name: str, arrays: dict[str, NDArray[Any]], *, ndim: int) -> Array:
    """An array of real, finite numbers. Raises DataError for any other."""
    array = arrays[name]
    if array.dtype.kind not in "fiu" or array.ndim != ndim or array.size == 0:
        raise DataError(
            f"{path}: {name} is {array.dtype} {list(array.shape)}; real numbers in {ndim} dimensions are expected."
        )
    if not np.isfinite(array).all():
        raise DataError(f"{path} holds values that are not finite in {name}: compute it again.")
    return array.astype(np.float64)


def _count(path: Path, name: str, arrays: dict[str, NDArray[Any]]) -> int:
    number = float(_checked(path, name, arrays, ndim=0))
    if number < 0 or not number.is_integer():
        raise DataError(f"{path}: {name} is {number:g}; a whole number from 0 is expected.")
    return int(number)


def _read_arrays(path: Path, names: tuple[str, ...] = _NAMES) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable npz file ({error}).") from error


def _identity(path: Path, arrays: dict[str, NDArray[Any]]) -> FeatureIdentity | None:
    if not set(_IDENTITY) <= arrays.keys():
        return None
    return FeatureIdentity(str(arrays["net"]), str(arrays["weights_sha256"]), _count(path, "resize", arrays))
