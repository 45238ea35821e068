"""Data splits for the benchmarks of the data pipeline, written for the occasion; and what a process's memory is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.codec import EXTENSIONS, Encoding
from data_pipeline.dataset import ShardDataset
from data_pipeline.files import sha256_file
from data_pipeline.index import Index, build_index, scan_shard
from data_pipeline.manifest import FORMAT, Manifest, Shard, SourceInfo
from data_pipeline.sources.generated import GeneratedSplit

Images = NDArray[np.uint8]


def photographs(place: Path | None, num: int, size: int) -> tuple[Images, NDArray[np.int64]]:
    """Images [num, size, size, 3] and labels: mosaics of a split's images, which have as much detail as small photos.

    Enlarged to at most double where they are smaller than a quarter of `size`; without a place, generated ones.
    """
    if place is None:
        split = GeneratedSplit(0, num, size, num_classes=10, seed=0)
        pairs = [split.load(position) for position in range(num)]
        return np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])
    dataset = ShardDataset(place)
    tile = dataset.manifest.image_size * (2 if size > 4 * dataset.manifest.image_size else 1)
    across = -(-size // tile)
    images = np.empty((num, size, size, 3), dtype=np.uint8)
    labels = np.empty(num, dtype=np.int64)
    for row in range(num):
        chosen = (row * across**2 + np.arange(across**2)) % len(dataset)
        tiles, classes = dataset.read(chosen)
        grown = [Image.fromarray(t).resize((tile, tile), Image.Resampling.BICUBIC) for t in tiles.transpose(0, 2, 3, 1)]
        grid = np.stack([np.asarray(image) for image in grown]).reshape(across, across, tile, tile, 3)
        images[row] = grid.swapaxes(1, 2).reshape(across * tile, across * tile, 3)[:size, :size]
        labels[row] = classes[0]
    return images, labels


def write_split(
    folder: Path,
    images: Images,  # [n, H, W, 3]
    labels: NDArray[np.int64],  # [n]
    encode: Callable[[Images], bytes],  # of one image [H, W, 3]
    encoding: Encoding,
    *,
    extension: str,
    num_shards: int,
) -> ShardDataset:
    """A split of tar shards, index and manifest in `folder`."""
    from webdataset import TarWriter

    folder.mkdir(parents=True)
    shards, members = [], []
    for number, rows in enumerate(np.array_split(np.arange(len(images)), num_shards)):
        path = folder / f"shard-{number:06d}.tar"
        with open(path, "wb") as file, TarWriter(file, mtime=0, encoder=False) as tar:
            for row in rows.tolist():
                label = str(labels[row]).encode()
                tar.write({"__key__": f"{row:09d}", extension: encode(images[row]), "cls": label})
        members.append(list(scan_shard(path, EXTENSIONS[encoding])))
        shards.append(shard_entry(path, len(rows), sha256_file(path)))
    describe(folder, build_index(members), shards, encoding, image_size=images.shape[1])
    return ShardDataset(folder)


def shard_entry(path: Path, num_samples: int, sha256: str) -> Shard:
    """A shard as the manifest lists it."""
    return Shard(file=path.name, num_samples=num_samples, num_bytes=path.stat().st_size, sha256=sha256)


def describe(folder: Path, index: Index, shards: list[Shard], encoding: Encoding, *, image_size: int) -> None:
    """Write the index and, last, the manifest."""
    num_classes = int(index.label.max()) + 1
    Manifest(
        format=FORMAT, name="benchmark", split="train", num_samples=len(index), image_size=image_size, num_channels=3,
        num_classes=num_classes, class_names=[f"class {number}" for number in range(num_classes)], encoding=encoding,
        preprocessing="none", source=SourceInfo(kind="benchmark", options={}, origin="written for a benchmark"),
        fingerprint="0" * 64, index_sha256=hashlib.sha256(index.save(folder)).hexdigest(), shards=shards,
    ).save(folder)  # fmt: skip


def memory_mib(pid: int | None = None) -> dict[str, float]:
    """Resident and proportional memory of a process in MiB (proportional: a page shared by k counts 1/k)."""
    text = Path(f"/proc/{pid or os.getpid()}/smaps_rollup").read_text()
    found = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return {name.lower(): int(found[name].split()[0]) / 1024 for name in ("Rss", "Pss")}
