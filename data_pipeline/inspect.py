"""Look at prepared data.

    python -m data_pipeline.inspect data/cifar10/train                     what it holds
    python -m data_pipeline.inspect data/cifar10/train --verify            every checksum, every image
    python -m data_pipeline.inspect data/cifar10/train --grid samples.png  a picture of some samples

Damage is listed sample by sample, and the exit code is then 2.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.counter_rng import Stream, generator
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError, run_cli
from data_pipeline.files import sha256_file, write_atomic
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.manifest import FILE_NAME, Manifest, remedy
from data_pipeline.progress import progress_bar

_CHUNK = 256  # images decoded at a time


def summary(dataset: ShardDataset) -> str:
    """What a split holds, for the terminal."""
    manifest = dataset.manifest
    sizes = [shard.num_samples for shard in manifest.shards]
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    counts = np.bincount(dataset.index.label[dataset.index.label >= 0], minlength=manifest.num_classes)
    lines = [
        ("data set", f"{manifest.name}, {manifest.split}"),
        ("images", f"{manifest.num_samples:,} of {manifest.image_size}x{manifest.image_size}, {manifest.encoding}"),
        ("shards", f"{len(sizes):,} of {min(sizes):,} to {max(sizes):,} images, {num_bytes / 1e6:,.1f} MB in all"),
        ("source", f"{manifest.source.kind} {manifest.source.options or ''} ({manifest.source.origin})"),
        ("resized by", manifest.preprocessing),
        ("fingerprint", manifest.fingerprint),
        ("classes", f"{manifest.num_classes or 'none: unlabelled'}"),
    ]
    lines += [(f"  {number}", f"{name}: {counts[number]:,}") for number, name in enumerate(manifest.class_names[:20])]
    if manifest.num_classes > 20:
        lines.append(("  ...", f"{manifest.num_classes - 20} more"))
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def verify(dataset: ShardDataset) -> list[str]:
    """Check every shard's sha256, every image's crc32 and pixels, and the fingerprint; returns what is wrong."""
    problems = []
    digests: list[bytes] = []
    with progress_bar(total=len(dataset), unit="img", description="verify") as bar:
        first = 0
        for shard in dataset.manifest.shards:
            path = dataset.folder / shard.file
            if (found := sha256_file(path)) != shard.sha256:
                problems.append(f"{path}: sha256 is {found}, expected {shard.sha256}")
            for start in range(first, first + shard.num_samples, _CHUNK):
                stop = min(start + _CHUNK, first + shard.num_samples)
                problems += _check_samples(dataset, range(start, stop), digests)
                bar.update(stop - start)
            first += shard.num_samples
    if not problems and fingerprint(digests) != dataset.manifest.fingerprint:
        problems.append(f"{dataset.folder}: the pixels or labels are not those of the manifest's fingerprint")
    return problems


def _check_samples(dataset: ShardDataset, samples: range, digests: list[bytes]) -> list[str]:
    problems = []
    for sample in samples:
        try:
            images, labels = dataset.read(np.array([sample]))
        except DataError as error:
            problems.append(str(error).partition(". See how far")[0])
            continue
        digests.append(sample_digest(images[0].transpose(1, 2, 0), int(labels[0])))
    return problems


def sample_grid(dataset: ShardDataset, *, rows: int = 8, columns: int = 16, seed: int = 0) -> Image.Image:
    """A grid of samples; one class a row where there are labels, else any."""
    rng = generator(seed, Stream.SAMPLE, 0)
    labels = dataset.index.label
    num_classes = min(dataset.manifest.num_classes, 32)
    pools = [np.flatnonzero(labels == number) for number in range(num_classes)] or [np.arange(len(labels))] * rows
    size = dataset.manifest.image_size
    grid = np.full((len(pools) * (size + 2) + 2, columns * (size + 2) + 2, 3), 255, dtype=np.uint8)
    for row, pool in enumerate(pools):
        chosen = pool[rng.random(len(pool)).argsort()[:columns]]
        images, _ = dataset.read(chosen)
        for column, image in enumerate(images):
            top, left = 2 + row * (size + 2), 2 + column * (size + 2)
            grid[top : top + size, left : left + size] = image.transpose(1, 2, 0)
    return Image.fromarray(grid)


def _splits(folder: Path) -> list[Path]:
    """`folder` itself if it is a split, else the splits in it."""
    if (folder / FILE_NAME).exists():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{FILE_NAME}")) or [folder]


def _write_grid(dataset: ShardDataset, path: Path) -> None:
    buffer = io.BytesIO()
    sample_grid(dataset).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
    print(f"sample grid: {path}")


def _report_problems(problems: list[str], folder: Path, manifest: Manifest) -> None:
    if not problems:
        print(f"verified: all {manifest.num_samples:,} images and {len(manifest.shards):,} shards are intact")
        return
    shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
    raise DataError(f"{folder}: {len(problems)} problems:\n  {shown}\n{remedy(folder, manifest.source)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description="Look at prepared data.")
    parser.add_argument("folder", type=Path, help="a prepared split, or the folder that holds its splits")
    parser.add_argument("--verify", action="store_true", help="check every checksum and decode every image")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a grid of samples")
    args = parser.parse_args(arguments)
    splits = _splits(args.folder)
    if args.grid and len(splits) > 1:
        raise DataError(f"--grid draws one split: name one of {', '.join(map(str, splits))}.")
    for folder in splits:
        dataset = ShardDataset(folder)
        print(summary(dataset))
        if args.grid:
            _write_grid(dataset, args.grid)
        if args.verify:
            _report_problems(verify(dataset), folder, dataset.manifest)
    return 0


if __name__ == "__main__":
    run_cli(main)
