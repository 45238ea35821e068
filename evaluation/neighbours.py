"""The training images nearest to samples: has the network learned the data by heart?

    python -m evaluation.neighbours samples.npz --data data/cifar10/train --held-out data/cifar10/test
    python -m evaluation.neighbours samples.npz --data data/cifar10/train --feature-net efflite0 --out near.png --json

In pixels, and with --feature-net in that net's pooled features too. A sample much nearer to a training image than
held-out images of the same number are to theirs is a copy. The figure shows it better than the number: samples that
are smooth lie near everything in pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError, run_cli
from data_pipeline.progress import progress_bar
from evaluation.device import pick_device
from evaluation.features import REGISTRY, FeatureNet, get_feature_net
from evaluation.sample_files import read_samples

BLOCK = 512  # training images in memory at a time


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of k queries, the nearest first."""

    index: NDArray[np.int64]  # [k, num], sample numbers in the data split
    distance: NDArray[np.float64]  # [k, num], in grey levels or in features

    def split(self, first: int) -> tuple[Neighbours, Neighbours]:
        """Those of the first queries and of the rest."""
        return (
            Neighbours(self.index[:first], self.distance[:first]),
            Neighbours(self.index[first:], self.distance[first:]),
        )


@dataclass(frozen=True)
class Memorisation:
    """Samples and held-out images, as many of either, by the distance to their nearest training images."""

    space: str  # "pixels", or the feature net's name
    num: int
    samples: float  # median distance
    held_out: float
    ratio: float  # samples / held_out: about 1 for new images, towards 0 for copies
    nearest_sample: float  # the smallest distance: a single copy shows here
    nearest_held_out: float


def nearest(
    queries: Tensor, dataset: ShardDataset, *, net: FeatureNet | None = None, num: int = 5, title: str = ""
) -> Neighbours:
    """The `num` images of a split that are nearest to each query, itself or mirrored (training mirrors too).

    The distance is Euclidean: in grey levels, or in the pooled features of `net`. The split is read in blocks, so
    memory does not grow with it. Squared distances are |q|^2 + |x|^2 - 2 q.x in float64: exact in pixels, where all
    three are whole numbers below 2^53 (up to images of some 200,000 pixels a side), and to 1e-15 of the squared norms
    in features. Of equally near images the first comes first, so the result does not depend on the block's size.

    Args:
        queries: uint8 [k, 3, H, W].
        title: of the progress bar; no bar without one.

    Raises:
        UserError: images of another size than the split's, or fewer than `num` in the split.
        DataError: damaged images.
    """
    _check(queries, dataset, num)
    ours = np.stack([_vectors(queries, net), _vectors(queries.flip(-1), net)])  # [2, k, D]
    best = np.full((len(queries), num), np.inf)
    index = np.full((len(queries), num), -1, dtype=np.int64)
    for start, images in _blocks(dataset, title):
        theirs = _vectors(torch.from_numpy(images), net)  # [n, D]
        squared = _squared_distances(ours, theirs).min(axis=0)  # [k, n]
        candidates = np.concatenate([best, squared], axis=1)  # [k, num + n]
        numbers = np.concatenate([index, np.broadcast_to(start + np.arange(len(theirs)), squared.shape)], axis=1)
        chosen = np.argsort(candidates, axis=1, kind="stable")[:, :num]
        best, index = np.take_along_axis(candidates, chosen, 1), np.take_along_axis(numbers, chosen, 1)
    return Neighbours(index, np.sqrt(best))


def memorisation(samples: Neighbours, held_out: Neighbours, *, space: str) -> Memorisation:
    """How near samples are to the training images, against held-out images; of the same split and as many."""
    assert len(samples.distance) == len(held_out.distance)
    ours, theirs = samples.distance[:, 0], held_out.distance[:, 0]
    middle, their_middle = float(np.median(ours)), float(np.median(theirs))
    ratio = middle / their_middle if their_middle else float("nan")
    return Memorisation(space, len(ours), middle, their_middle, ratio, float(ours.min()), float(theirs.min()))


def neighbour_figure(queries: Tensor, dataset: ShardDataset, neighbours: Neighbours, path: Path) -> None:
    """A picture with a row for each query, uint8 [k, 3, H, W]: itself, then its neighbours with their distances."""
    from evaluation.report.figures import save_figure  # matplotlib takes long to import
    from evaluation.report.neighbour_figures import draw_neighbours

    k, num = neighbours.index.shape
    found, _ = dataset.read(neighbours.index.ravel())
    images = np.concatenate([queries.numpy()[:, None], found.reshape(k, num, *found.shape[1:])], axis=1)
    save_figure(draw_neighbours(images.transpose(0, 1, 3, 4, 2), neighbours.distance), path)


def _check(queries: Tensor, dataset: ShardDataset, num: int) -> None:
    size = dataset.manifest.image_size
    if tuple(queries.shape[1:]) != (3, size, size):
        raise UserError(
            f"the samples are {queries.shape[-1]}x{queries.shape[-2]}, the images in {dataset.place} {size}x{size}; "
            "name a split of the samples' size."
        )
    if not 1 <= num <= len(dataset):
        raise UserError(f"{num} neighbours are asked for; {dataset.place} has {len(dataset)} images: ask for fewer.")


def _vectors(images: Tensor, net: FeatureNet | None) -> NDArray[np.float64]:
    """What distances are measured between: [n, D] of images uint8 [n, 3, H, W]."""
    vectors = images.flatten(1) if net is None else net(images).pool
    doubles: NDArray[np.float64] = vectors.double().numpy()
    return doubles


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2, k, D] and [n, D] -> [2, k, n]."""
    squared: NDArray[np.float64] = (a**2).sum(axis=-1)[:, :, None] + (b**2).sum(axis=-1) - 2 * (a @ b.T)
    return squared.clip(min=0.0)  # features: what rounding took below


def _blocks(dataset: ShardDataset, title: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    total = len(dataset)
    with progress_bar(total=total, unit="img", description=title, disable=not title) as bar:
        for start in range(0, total, BLOCK):
            images, _ = dataset.read(np.arange(start, min(start + BLOCK, total)))
            yield start, images
            bar.update(len(images))


def _samples(path: Path, num: int) -> Tensor:
    """`num` samples of an npz or of a folder of shards, spread evenly over it. Raises UserError for fewer there."""
    if path.is_dir():
        dataset = ShardDataset(path)
        return torch.from_numpy(dataset.read(_spread(len(dataset), num, path))[0])
    images, _ = read_samples(path, option="SAMPLES")
    return images[torch.from_numpy(_spread(len(images), num, path))].contiguous()


def _spread(total: int, num: int, path: Path) -> NDArray[np.int64]:
    if num > total:
        raise UserError(f"--num-samples {num}: {path} has {total} images; ask for no more.")
    return np.arange(num, dtype=np.int64) * total // num


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The training images nearest to samples (memorisation check).")
    parser.add_argument("samples", type=Path, help="samples.npz, or a folder of shards")
    parser.add_argument("--data", required=True, help="the split that was trained on")
    parser.add_argument("--held-out", type=Path, help="a split that was not, to compare with: the memorisation ratio")
    parser.add_argument("--num-samples", type=int, default=16, help="how many, spread evenly over the samples")
    parser.add_argument("--num", type=int, default=5, help="neighbours of each")
    parser.add_argument("--feature-net", choices=sorted(REGISTRY), help="also in this net's features")
    parser.add_argument("--feature-weights", type=Path, help="the net's weights, where they come with no package")
    parser.add_argument("--num-threads", type=int, help="CPU threads")
    parser.add_argument(
        "--out", type=Path, help="picture.png (default: SAMPLES-neighbours.png); that of features: picture-NET.png"
    )
    parser.add_argument("--json", action="store_true", help="print indices, distances and ratios as JSON")
    a = parser.parse_args()
    for name in ("num_samples", "num", "num_threads"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small; use 1 or more.")
    a.out = a.out or a.samples.with_name(f"{a.samples.stem}-neighbours.png")
    if a.out.suffix != ".png":
        raise UserError(f"--out {a.out} must end in .png.")
    return a


def main() -> int:
    """The command line."""
    a = _parse()
    device = pick_device(a.num_threads)
    dataset, samples = ShardDataset(a.data), _samples(a.samples, a.num_samples)
    held_out = None if a.held_out is None else _samples(a.held_out, a.num_samples)
    for images in (samples, held_out):
        if images is not None:
            _check(images, dataset, a.num)
    queries = samples if held_out is None else torch.cat([samples, held_out])  # the split is gone through once
    nets: list[FeatureNet | None] = [None]
    if a.feature_net is not None:
        nets.append(get_feature_net(a.feature_net, device=str(device), weights=a.feature_weights))
    report: dict[str, Any] = {"data": dataset.manifest.fingerprint, "spaces": {}}
    for net in nets:
        space = "pixels" if net is None else net.name
        every = nearest(queries, dataset, net=net, num=a.num, title=f"nearest in {space}")
        found, theirs = every.split(len(samples))
        path = a.out if net is None else a.out.with_stem(f"{a.out.stem}-{net.name}")
        neighbour_figure(samples, dataset, found, path)
        entry: dict[str, Any] = {"index": found.index.tolist(), "distance": found.distance.tolist()}
        line = f"{space}: median distance {np.median(found.distance[:, 0]):.4g}, smallest {found.distance.min():.4g}"
        if held_out is not None:
            result = memorisation(found, theirs, space=space)
            entry["memorisation"] = asdict(result)
            line += f"; held-out {result.held_out:.4g}, {result.nearest_held_out:.4g}; ratio {result.ratio:.3f}"
        report["spaces"][space] = entry
        print(f"{line}: {path}", file=sys.stderr if a.json else sys.stdout)
    if a.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    return 0


if __name__ == "__main__":
    run_cli(main)
