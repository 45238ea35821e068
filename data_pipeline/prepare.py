"""Raw images -> shards, index and manifest.

    python -m data_pipeline.prepare cifar10   --out data/cifar10 [--from ARCHIVE_OR_FOLDER]
    python -m data_pipeline.prepare folder    --out data/mine --from DIR --size 64 [--holdout 0.1]
    python -m data_pipeline.prepare generated --out data/generated --size 32 --num-train 1024 --num-test 256

OUT appears when it is complete and not before. Asked again for what OUT already holds, the command ends at once.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data_pipeline.dataset import check_shards, load_index
from data_pipeline.errors import DataError, run_cli
from data_pipeline.files import write_atomic
from data_pipeline.manifest import FORMAT, Manifest, SourceInfo
from data_pipeline.progress import progress_bar
from data_pipeline.shards import EncodedSample, WrittenSplit, encode_sample, write_shards
from data_pipeline.sources import SOURCES
from data_pipeline.sources.base import Collection, Source, Split, UnreadableImageError
from data_pipeline.workspace import workspace

UNREADABLE_FILE = "unreadable.txt"


def prepare(source: Source, out: Path, *, shard_mb: float = 32.0) -> None:
    """Write the splits of `source` into `out`, unless they are already there.

    Raises:
        DataError: the source cannot be had, or `out` holds something else or is being written by another process.
    """
    if is_prepared(source, out):
        print(f"{out} already holds this data set, complete: nothing to do.")
        return
    with workspace(out) as work:
        collection = source.open(work.scratch)
        unreadable: list[str] = []
        for name, split in collection.splits.items():
            folder = work.result / name
            folder.mkdir()
            with progress_bar(total=len(split), unit="img", description=f"{name}: write") as bar:
                samples = _encoded(split, unreadable, bar)
                written = write_shards(samples, folder, shard_bytes=int(shard_mb * 1e6))
            if not written.shards:
                raise DataError(f"none of the {len(split)} images of {name} can be read; the first: {unreadable[0]}")
            manifest = _describe(source, collection, name, written, folder)
            print(
                f"{name}: {manifest.num_samples:,} images in {len(manifest.shards)} shards, "
                f"fingerprint {manifest.fingerprint[:16]}"
            )
        if unreadable:
            write_atomic(work.result / UNREADABLE_FILE, "\n".join(unreadable) + "\n")
            print(f"{len(unreadable)} images could not be read: see {out / UNREADABLE_FILE}")
        work.publish()
    print(f"{out} is ready: {collection.origin}")


def is_prepared(source: Source, out: Path) -> bool:
    """Whether `out` holds exactly what `source` describes.

    Raises:
        DataError: it holds something else, or a damaged data set.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise DataError(f"--out {out} is a file. Choose another --out.")
    folders = sorted(path for path in out.iterdir() if (path / "manifest.json").exists())
    if not folders:
        raise DataError(f"--out {out} is not empty and holds no prepared data. Choose another --out.")
    for folder in folders:
        manifest = Manifest.load(folder)
        if (manifest.source.kind, manifest.source.options) != (source.kind, source.options()):
            raise DataError(
                f"--out {out} already holds other data: {manifest.source.kind} {manifest.source.options}, "
                f"asked for {source.kind} {source.options()}. Choose another --out, or remove that folder first."
            )
        check_shards(folder, manifest)
        load_index(folder, manifest)
    lost = sorted(set(source.split_names()) - {folder.name for folder in folders})
    if lost:
        raise DataError(f"{out / lost[0]} is missing. Remove {out} and run the same command again.")
    return True


def _describe(source: Source, collection: Collection, name: str, written: WrittenSplit, folder: Path) -> Manifest:
    """Write the index and, last, the manifest of a split."""
    manifest = Manifest(
        format=FORMAT,
        name=source.name,
        split=name,
        num_samples=len(written.index),
        image_size=collection.image_size,
        num_channels=3,
        num_classes=len(collection.class_names),
        class_names=collection.class_names,
        encoding="png",
        preprocessing=collection.preprocessing,
        source=SourceInfo(kind=source.kind, options=source.options(), origin=collection.origin),
        fingerprint=written.fingerprint,
        index_sha256=hashlib.sha256(written.index.save(folder)).hexdigest(),
        shards=written.shards,
    )
    manifest.save(folder)
    return manifest


def _encoded(split: Split, unreadable: list[str], bar: tqdm[Any]) -> Iterator[EncodedSample]:
    """All samples that can be read; the others are noted in `unreadable`, and their keys stay free."""
    for position in range(len(split)):
        bar.update()
        try:
            image, label = split.load(position)
        except UnreadableImageError as error:
            unreadable.append(str(error))
            continue
        yield encode_sample(position, image, label)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare", description="Write images as shards with an index and a manifest."
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for kind, source in SOURCES.items():
        command = sources.add_parser(kind, help=(source.__doc__ or "").splitlines()[0])
        command.add_argument("--out", type=Path, required=True, help="folder that will hold train/ and test/")
        command.add_argument("--shard-mb", type=float, default=32.0, help="size of a shard in MB (default 32)")
        source.add_arguments(command)
    return parser


def _on_sigterm(*_: object) -> NoReturn:
    raise KeyboardInterrupt  # clean up as for Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.shard_mb <= 0:
        raise DataError(f"--shard-mb is {args.shard_mb}; it must be positive.")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    prepare(SOURCES[args.source].from_arguments(args), args.out, shard_mb=args.shard_mb)
    return 0


if __name__ == "__main__":
    run_cli(main)
