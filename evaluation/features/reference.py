"""Statistics of the real images of a data split, computed once and cached by all that they depend on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.progress import progress_bar
from evaluation.features import FeatureNet, identity_of
from evaluation.metrics.frechet import Floor, frechet_distance
from evaluation.moments import Moments
from evaluation.statistics import FeatureStats, read_stats, stats_from_moments, write_stats

if TYPE_CHECKING:
    from data_pipeline.dataset import ShardDataset

BATCH = 64


def stats_of_images(
    net: FeatureNet, batches: Iterable[torch.Tensor], *, data: str, total: int | None = None, progress: str = ""
) -> FeatureStats:
    """Feature statistics of batches of uint8 images [N, C, H, W] (files or samples made on the fly alike).

    Args:
        data: fingerprint of the images.
        total: number of images, for the progress bar.
        progress: the bar's title; no bar without one.

    Raises:
        DataError: images of a wrong type, features that are not finite, fewer than two images.
    """
    moments = Moments(net.dim)
    with progress_bar(total=total, unit="img", description=progress, disable=not progress) as bar:
        for images in batches:
            moments.add(net(as_colour(images)).pool.numpy())
            bar.update(len(images))
    return stats_from_moments(moments, identity=identity_of(net), data=data)


def as_colour(images: torch.Tensor) -> torch.Tensor:
    """Grey images [N, 1, H, W] with their channel repeated three times; others unchanged."""
    return images.expand(-1, 3, -1, -1) if images.ndim == 4 and images.shape[1] == 1 else images


def spread(total: int, num: int | None, *, part: int = 0, parts: int = 1) -> NDArray[np.int64]:
    """Indices of `num` images spread evenly over `total`, so that a split sorted by class is still covered.

    With `parts` > 1: one of `parts` disjoint, interleaved sets of `num` images each. None: all images.

    Raises:
        DataError: more images asked for than there are.
    """
    if num is None:
        num = total // parts
    if not 0 < num * parts <= total:
        raise DataError(f"{parts} x {num} images are asked for; the split has {total}.")
    positions = np.arange(num * parts, dtype=np.int64) * total // (num * parts)
    return positions[part::parts]


def reference_stats(
    dataset: ShardDataset,
    net: FeatureNet,
    *,
    num: int | None = None,
    part: int = 0,
    parts: int = 1,
    cache: Path | None = None,
    progress: bool = True,
) -> FeatureStats:
    """Feature statistics of `num` (default: all) images of a data split, from `cache` if they are there.

    Args:
        part, parts: which of `parts` disjoint sets of `num` images, see `spread`.
        cache: folder of npz files, named by data fingerprint, net, weights hash, resize and images.

    Raises:
        DataError: too few images, or damaged ones.
    """
    indices = spread(len(dataset), num, part=part, parts=parts)
    path = None
    if cache is not None:
        selection = f"{len(indices)}" if parts == 1 else f"{len(indices)}-part{part}of{parts}"
        fingerprint = dataset.manifest.fingerprint.replace(":", "-")[:24]
        path = cache / f"{fingerprint}-{net.name}-{net.weights_sha256[:12]}-{net.resize}px-{selection}.npz"
        if path.is_file():
            found = read_stats(path, identity=identity_of(net))
            if found.data == dataset.manifest.fingerprint and found.num == len(indices):
                return found
    batches = (
        torch.from_numpy(dataset.read(indices[start : start + BATCH])[0]) for start in range(0, len(indices), BATCH)
    )
    stats = stats_of_images(
        net,
        batches,
        data=dataset.manifest.fingerprint,
        total=len(indices),
        progress=f"{net.name} features of {dataset.manifest.name}/{dataset.manifest.split}" if progress else "",
    )
    if path is not None:
        write_stats(path, stats)
    return stats


def split_floor(dataset: ShardDataset, net: FeatureNet, *, num: int, cache: Path | None = None) -> Floor:
    """The real-against-real floor at N = `num`: two disjoint, interleaved sets of real images of one split.

    Raises:
        DataError: the split has fewer than 2 * num images.
    """
    first, second = (reference_stats(dataset, net, num=num, part=part, parts=2, cache=cache) for part in (0, 1))
    return Floor(frechet_distance(first, second), None, num, 1)
