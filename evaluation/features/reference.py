"""Features of real images: of a data split, cached by all that they depend on, or of published statistics."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_pipeline.errors import DataError
from data_pipeline.progress import progress_bar
from evaluation.chunks import Advance, Arrays, Chunks, cut
from evaluation.features import FeatureNet, identity_of
from evaluation.features.feature_set import FeatureSet, feature_arrays, gather, read_feature_set, spread
from evaluation.image_sets import BATCH, ImageSet, NpzImages, batches, holds_images
from evaluation.quality import Measured, need_rows, quality
from evaluation.statistics import read_stats

if TYPE_CHECKING:
    from data_pipeline.dataset import ShardDataset


def reference_features(
    dataset: ShardDataset, net: FeatureNet, *, num: int | None = None, part: int = 0, parts: int = 1,
    with_rows: bool = True, cache: Path | None = None, chunks: Chunks | None = None, title: str = "",
) -> FeatureSet:  # fmt: skip
    """Features of `num` (default: all) images of a data split, from `cache` if they are there.

    Args:
        part, parts: which of `parts` disjoint sets of `num` images, see `spread`.
        with_rows: whether the features of single images are wanted.
        cache: folder of cached features, each in a folder named by data fingerprint, net, weights, resize and images.
        chunks: the work, where it is shared with other processes; default: all here.
        title: of the progress bar; no bar without one.

    Raises:
        DataError: too few images, or damaged ones.
    """
    rows = spread(len(dataset), num, part=part, parts=parts)
    data = dataset.manifest.fingerprint
    selection = f"{len(rows)}" if parts == 1 else f"{len(rows)}-part{part}of{parts}"
    folder, num = _cache_folder(cache, net, data, selection), len(rows)
    identity = identity_of(net)
    if folder and (found := read_feature_set(folder, identity, data=data, num=num, with_rows=with_rows)):
        return found
    slices = cut(len(rows), BATCH)

    def make(number: int, advance: Advance) -> Arrays:
        images, _ = dataset.read(rows[slices[number]])  # [n, 3, H, W]
        arrays = feature_arrays(net(torch.from_numpy(images)))
        advance(len(images))
        return arrays

    results = (chunks or Chunks()).results(
        "reference" if parts == 1 else f"reference-part{part}of{parts}", len(slices), make,
        work=lambda number: slices[number].stop - slices[number].start, unit="img", title=title,
    )  # fmt: skip
    kept = folder if cache is not None and _can_write(cache) else None  # data may be a read-only share
    return gather(net, results, data=data, num=num, folder=kept, with_rows=with_rows)


def real_floor(
    dataset: ShardDataset, net: FeatureNet, kinds: Sequence[str], *, num: int, cache: Path | None = None,
    chunks: Chunks | None = None, title: str = "",
) -> dict[str, Measured]:  # fmt: skip
    """Real against real: the metrics of `num` images of a split against `num` others, interleaved with them.

    It is what a perfect generator would get at this N; precision and recall have a ceiling here, no floor.

    Raises:
        DataError: the split has fewer than 2 * num images.
    """
    first, second = (
        reference_features(
            dataset, net, num=num, part=part, parts=2, with_rows=need_rows(kinds), cache=cache, chunks=chunks,
            title=title,
        )
        for part in (0, 1)
    )  # fmt: skip
    return quality(first, second, kinds)


def image_features(
    images: ImageSet, net: FeatureNet, *, num: int | None = None, cache: Path | None = None, title: str = ""
) -> FeatureSet:
    """Features of `num` (default: all) of a set of images, spread over it; `cache` and errors as above."""
    rows = spread(len(images), num)
    folder = _cache_folder(cache, net, images.fingerprint, f"{len(rows)}")
    identity, data = identity_of(net), images.fingerprint
    if folder is not None and (found := read_feature_set(folder, identity, data=data, num=len(rows))):
        return found

    def parts() -> Iterator[Arrays]:
        with progress_bar(total=len(rows), unit="img", description=title, disable=not title) as bar:
            for batch in batches(images, rows):
                yield feature_arrays(net(batch))
                bar.update(len(batch))

    return gather(net, parts(), data=data, num=len(rows), folder=folder)


def published_features(
    path: Path, net: FeatureNet, *, with_rows: bool, cache: Path | None = None, title: str = ""
) -> FeatureSet:
    """A file of statistics as something to compare samples with.

    Args:
        net: what the file is of; of another project's it is taken at the caller's word.
        with_rows: also compute the features of the images that the file brings (ADM's do), for the metrics that need
            those of single images; they may be others and fewer than the statistics are of. `cache`: as above.

    Raises:
        DataError: not a file of statistics, or of another net.
    """
    stats = read_stats(path, identity=identity_of(net))
    if stats.pool.dim != net.dim:
        raise DataError(
            f"{path} holds statistics of {stats.pool.dim} dimensions, the features of {net.name} have {net.dim}: "
            "it is of another net; name that one with --feature-net."
        )
    if not (with_rows and holds_images(path)):
        return FeatureSet(stats, None)
    return FeatureSet(stats, image_features(NpzImages(path), net, cache=cache, title=title).rows)


def _can_write(folder: Path) -> bool:
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


def _cache_folder(cache: Path | None, net: FeatureNet, data: str, selection: str) -> Path | None:
    if cache is None:
        return None
    fingerprint = data.replace(":", "-")[:24]
    return cache / f"{fingerprint}-{net.name}-{net.weights_sha256[:12]}-{net.resize}px-{selection}"
