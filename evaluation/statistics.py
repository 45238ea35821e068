"""Feature statistics of one set of images, with all that says what they may be compared to; their npz files."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from evaluation.moments import Moments

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FeatureIdentity:
    """What made the features: statistics are comparable if and only if all of it is equal."""

    net: str  # name in the registry of feature nets, such as "efflite0"
    weights_sha256: str
    resize: int  # side in pixels that images were resized to


@dataclass(frozen=True)
class FeatureStats:
    """Mean and covariance of the features of one set of images."""

    identity: FeatureIdentity
    data: str  # fingerprint of the images (a data split's, or the weights that made the samples)
    num: int  # images; 0 where a foreign file does not say
    mean: Array  # [dim]
    covariance: Array  # [dim, dim], unbiased
    features: Array | None = None  # [num, dim], kept while num <= dim: distances are exact from them

    @property
    def dim(self) -> int:
        return len(self.mean)


def stats_from_moments(moments: Moments, *, identity: FeatureIdentity, data: str) -> FeatureStats:
    """Close a stream of features.

    Raises:
        DataError: fewer than two images.
    """
    return FeatureStats(identity, data, moments.num, moments.mean, moments.covariance, moments.features)


def require_comparable(x: FeatureIdentity, y: FeatureIdentity) -> None:
    """Refuse statistics of different nets, weights or resizes.

    Raises:
        DataError: names what differs.
    """
    names = ("net", "weights_sha256", "resize")
    differing = [f"{n} {getattr(x, n)!r} against {getattr(y, n)!r}" for n in names if getattr(x, n) != getattr(y, n)]
    if differing:
        raise DataError(
            f"these feature statistics cannot be compared: {'; '.join(differing)}. "
            "Compute both with the same feature net, weights and resize."
        )


def write_stats(path: Path, stats: FeatureStats) -> None:
    """Write an npz, atomically: mu, sigma, N, net, weights_sha256, resize, data; features where kept."""
    arrays: dict[str, Any] = {
        "mu": stats.mean,
        "sigma": stats.covariance,
        "N": np.int64(stats.num),
        "net": stats.identity.net,
        "weights_sha256": stats.identity.weights_sha256,
        "resize": np.int64(stats.identity.resize),
        "data": stats.data,
    }
    if stats.features is not None:
        arrays["features"] = stats.features
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def read_stats(path: Path, *, identity: FeatureIdentity | None = None) -> FeatureStats:
    """Read an npz of statistics.

    Files of other projects hold only `mu` and `sigma` and do not say what made them: `identity` says it for them.
    For files that do say it, `identity` is what is expected.

    Raises:
        DataError: unreadable, incomplete or non-finite statistics, no identity known, or not the expected one.
    """
    arrays = _read_arrays(path)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(missing)}: not a file of feature statistics.")
    found = _identity(arrays) or identity
    if found is None:
        raise DataError(f"{path} does not say which feature net made it: name the net to read it.")
    if identity is not None:
        require_comparable(found, identity)
    mean, covariance = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} are not [d] and [d, d].")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} holds values that are not finite: compute it again.")
    data = str(arrays.get("data", ""))
    return FeatureStats(found, data, int(arrays.get("N", 0)), mean, covariance, arrays.get("features"))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("mu", "sigma", "N", "net", "weights_sha256", "resize", "data", "features")
            return {name: file[name] for name in names if name in file}
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable npz file ({error}).") from error


def _identity(arrays: dict[str, NDArray[Any]]) -> FeatureIdentity | None:
    if not {"net", "weights_sha256", "resize"} <= arrays.keys():
        return None
    return FeatureIdentity(str(arrays["net"]), str(arrays["weights_sha256"]), int(arrays["resize"]))
