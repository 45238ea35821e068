"""Look at prepared data.

    python -m data_pipeline.inspect data/cifar10/train                     what it holds
    python -m data_pipeline.inspect data/cifar10/train --shards            and where: a line a shard
    python -m data_pipeline.inspect data/cifar10/train --verify            every checksum, every image
    python -m data_pipeline.inspect data/cifar10/train --grid samples.png  a picture of some samples

`--json` tells the same as one line of JSON a split. Damage is listed shard by shard, and the exit code is then 2.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.counter_rng import Stream, generator
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError, run_cli
from data_pipeline.files import write_atomic
from data_pipeline.manifest import FILE_NAME, remedy
from data_pipeline.processes import available_cpus
from data_pipeline.progress import say
from data_pipeline.verify import verify

_CLASSES_SHOWN = 20
_DAMAGED_SHOWN = 20


def summary(dataset: ShardDataset) -> dict[str, Any]:
    """What a split holds; `labels` counts the images of every class."""
    manifest, label = dataset.manifest, dataset.index.label
    samples = [shard.num_samples for shard in manifest.shards]
    sizes = [shard.num_bytes for shard in manifest.shards]
    return {
        "place": dataset.place,
        "name": manifest.name,
        "split": manifest.split,
        "num_samples": manifest.num_samples,
        "image_size": manifest.image_size,
        "encoding": manifest.encoding,
        "bytes_per_image": round(float(dataset.index.size.mean()), 1),
        "num_shards": len(sizes),
        "samples_per_shard": [min(samples), max(samples)],
        "bytes_per_shard": [min(sizes), max(sizes)],
        "num_bytes": sum(sizes),
        "source": manifest.source.model_dump(),
        "preprocessing": manifest.preprocessing,
        "fingerprint": manifest.fingerprint,
        "class_names": manifest.class_names,
        "labels": np.bincount(label[label >= 0], minlength=manifest.num_classes).tolist(),
        "num_unlabelled": int((label < 0).sum()),
    }


def shard_rows(dataset: ShardDataset) -> list[dict[str, Any]]:
    """Where the samples lie: a row a shard."""
    rows, first = [], 0
    for shard in dataset.manifest.shards:
        rows.append(shard.model_dump() | {"first_sample": first})
        first += shard.num_samples
    return rows


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


def _splits(place: str) -> list[str]:
    """`place` itself if it is a split (or a URL, which cannot be searched), else the splits in it."""
    if "://" in place or (Path(place) / FILE_NAME).exists():
        return [place]
    return sorted(str(path.parent) for path in Path(place).glob(f"*/{FILE_NAME}")) or [place]


def _summary_text(told: dict[str, Any]) -> str:
    source, size, (smallest, largest) = told["source"], told["image_size"], told["bytes_per_shard"]
    lines = [
        ("data set", f"{told['name']}, {told['split']}"),
        (
            "images",
            f"{told['num_samples']:,} of {size}x{size}, {told['encoding']}, {told['bytes_per_image']:,.0f} bytes each",
        ),
        (
            "shards",
            f"{told['num_shards']:,} of {_range(told['samples_per_shard'])} images, {smallest / 1e6:,.1f} to "
            f"{largest / 1e6:,.1f} MB, {told['num_bytes'] / 1e6:,.1f} MB in all",
        ),
        ("source", f"{source['kind']} {source['options'] or ''} ({source['origin']})"),
        ("resized by", told["preprocessing"]),
        ("fingerprint", told["fingerprint"]),
        ("classes", _classes_text(told["labels"], told["num_unlabelled"])),
    ]
    named = list(zip(told["class_names"], told["labels"], strict=False))
    lines += [(f"  {number}", f"{name}: {count:,}") for number, (name, count) in enumerate(named[:_CLASSES_SHOWN])]
    if len(named) > _CLASSES_SHOWN:
        lines.append(("  ...", f"{len(named) - _CLASSES_SHOWN} more"))
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _classes_text(labels: list[int], num_unlabelled: int) -> str:
    if not labels:
        return "none: unlabelled"
    without = f", {num_unlabelled:,} images without a label" if num_unlabelled else ""
    return f"{len(labels):,} of {_range(labels)} images{without}"


def _range(counts: list[int]) -> str:
    fewest, most = min(counts), max(counts)
    return f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"


def _shards_text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'shard':<20} {'samples':>9} {'from':>11} {'MB':>9}  sha256"]
    lines += [
        f"{row['file']:<20} {row['num_samples']:>9,} {row['first_sample']:>11,} {row['num_bytes'] / 1e6:>9,.1f}  "
        f"{row['sha256'][:16]}"
        for row in rows
    ]
    return "\n".join(lines)


def _write_grid(dataset: ShardDataset, path: Path) -> None:
    buffer = io.BytesIO()
    sample_grid(dataset).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def _problem_text(dataset: ShardDataset, problems: list[str]) -> str:
    more = [f"... and {len(problems) - _DAMAGED_SHOWN} more"] if len(problems) > _DAMAGED_SHOWN else []
    shown = "".join(f"\n  {problem}" for problem in [*problems[:_DAMAGED_SHOWN], *more])
    return f"{dataset.place}: {len(problems)} problems:{shown}\n{remedy(dataset.place, dataset.manifest.source)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description="Look at prepared data.")
    parser.add_argument("place", help="a prepared split (folder or URL), or the folder that holds several")
    parser.add_argument("--shards", action="store_true", help="list the shards")
    parser.add_argument("--verify", action="store_true", help="check every checksum and decode every image")
    parser.add_argument(
        "--num-processes", type=int, default=available_cpus(), help="for --verify (default: the CPUs, %(default)s)"
    )
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a grid of samples")
    parser.add_argument("--json", action="store_true", help="print one line of JSON a split")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.num_processes < 1:
        raise DataError(f"--num-processes is {args.num_processes}; it must be at least 1.")
    splits = _splits(args.place)
    if args.grid and len(splits) > 1:
        raise DataError(f"--grid draws one split: name one of {', '.join(splits)}.")
    damaged = []
    for place in splits:
        dataset = ShardDataset(place)
        problems = _tell(dataset, args)
        if problems:
            damaged.append(_problem_text(dataset, problems))
        dataset.close()
    if damaged:
        raise DataError("\n".join(damaged))
    return 0


def _tell(dataset: ShardDataset, args: argparse.Namespace) -> list[str]:
    """Print and write what was asked for; returns what --verify found wrong."""
    told = summary(dataset)
    rows = shard_rows(dataset) if args.shards else []
    if not args.json:
        say("\n".join([_summary_text(told), *([_shards_text(rows)] if rows else [])]))
    if args.grid:
        _write_grid(dataset, args.grid)
    problems = verify(dataset, num_processes=args.num_processes) if args.verify else []
    if args.json:
        asked = ({"shards": rows} if rows else {}) | ({"problems": problems} if args.verify else {})
        print(json.dumps(told | asked))
        return problems
    if args.grid:
        print(f"sample grid: {args.grid}")
    if args.verify and not problems:
        print(f"verified: all {told['num_samples']:,} images and {told['num_shards']:,} shards are intact")
    return problems


if __name__ == "__main__":
    run_cli(main)
