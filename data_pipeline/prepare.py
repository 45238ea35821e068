"""Raw images -> shards, index and manifest.

    python -m data_pipeline.prepare cifar10   --out data/cifar10 [--from ARCHIVE_OR_FOLDER]
    python -m data_pipeline.prepare imagenet  --out data/imagenet64 --from DIR --size 64 [--encoding npy]
    python -m data_pipeline.prepare folder    --out data/mine --from DIR --size 64 [--holdout 0.1]
    python -m data_pipeline.prepare generated --out data/generated --size 32 --num-train 1024 --num-test 256

OUT appears when it is complete and not before. Stopped in any way, the same command goes on behind the last complete
shard. Asked again for what OUT already holds, it ends at once. Originals that cannot be read are left out and listed in
OUT/unreadable.txt, up to a limit. The number of processes does not change the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data_pipeline import journal
from data_pipeline.codec import Encoding
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError, run_cli
from data_pipeline.journal import Journal
from data_pipeline.manifest import FORMAT, Manifest, SourceInfo
from data_pipeline.processes import WorkerPool, available_cpus
from data_pipeline.progress import progress_bar, say
from data_pipeline.shards import EncodedSample, encode_sample, join_shards, written_shards
from data_pipeline.sources import SOURCES
from data_pipeline.sources.base import Collection, Source, Split, UnreadableImageError
from data_pipeline.unreadable import UnreadableReport
from data_pipeline.workspace import Request, clear_leftovers, workspace

UNREADABLE_FILE = "unreadable.txt"
_PIECE_BYTES = 1 << 20  # of the pixels of a piece: several pieces are held for every process
_PIECE_IMAGES = 32  # at most: the originals may be large and slow

Made = EncodedSample | str  # an image as a sample, or what is wrong with its original


@dataclass(frozen=True)
class Piece:
    """Some images of a split, which one process makes at a time."""

    split: str
    positions: range

    def __str__(self) -> str:
        return f"images {self.positions.start} to {self.positions.stop - 1} of {self.split}"


def prepare(
    source: Source, out: Path, *, shard_mb: float = 32.0, encoding: Encoding = "png", num_processes: int = 1,
    max_unreadable: int = 100,
) -> None:  # fmt: skip
    """Write the splits of `source` into `out`, unless they are already there.

    Raises:
        DataError: the source cannot be had, more than `max_unreadable` of its images cannot be read, or `out` holds
            something else or is being written by another process.
    """
    wanted = SourceInfo(kind=source.kind, options=source.options(), origin="")
    if is_prepared(wanted, source.split_names(), out, encoding):
        clear_leftovers(out)
        print(f"{out} already holds this data set, complete: nothing to do.")
        return
    with workspace(out, request=_request(source, wanted, encoding, shard_mb)) as work:
        journals = {name: Journal(work.journal / name, work.result / name) for name in source.split_names()}
        print(f"looking for the images of {source.kind} ...", flush=True)
        collection = source.open(work.scratch)
        for name, noted in journals.items():
            _go_back_to_mended(collection.splits[name], noted)
        _tell_what_is_there(journals)
        info = wanted.model_copy(update={"origin": collection.origin})
        report = UnreadableReport(work.result / UNREADABLE_FILE, max_unreadable)
        pieces = {name: _pieces(collection, name, found.next_position) for name, found in journals.items()}
        num_processes = max(1, min(num_processes, sum(map(len, pieces.values()))))
        make = partial(_make, collection, encoding)
        with WorkerPool(make, num_processes) as pool, _bar(collection, journals) as bar:
            for name, noted in journals.items():
                folder = work.result / name
                _write_split(pool.map(pieces[name]), folder, noted, report, bar, shard_bytes=int(shard_mb * 1e6))
                manifest = _describe(source.name, info, collection, encoding, noted, folder)
                say(
                    f"{name}: {manifest.num_samples:,} images in {len(manifest.shards)} shards, "
                    f"fingerprint {manifest.fingerprint[:16]}"
                )
        work.publish()
    for remark in collection.remarks():
        print(remark)
    if report.noted:
        print(f"{len(report.noted)} images could not be read and are left out: see {out / UNREADABLE_FILE}")
    print(f"{out} is ready: {collection.origin}")


def is_prepared(wanted: SourceInfo, splits: list[str], out: Path, encoding: Encoding) -> bool:
    """Whether `out` holds exactly these splits of a source (wherever they came from), so encoded.

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
        found = manifest.source
        if (found.kind, found.options, manifest.encoding) != (wanted.kind, wanted.options, encoding):
            raise DataError(
                f"--out {out} already holds other data: {found.kind} {found.options} as {manifest.encoding}, "
                f"asked for {wanted.kind} {wanted.options} as {encoding}. Choose another --out, or remove that "
                "folder first."
            )
        ShardDataset(folder)  # raises where a file is missing or damaged
    lost = sorted(set(splits) - {folder.name for folder in folders})
    if lost:
        raise DataError(f"{out / lost[0]} is missing. Remove {out} and run the same command again.")
    return True


def _request(source: Source, wanted: SourceInfo, encoding: Encoding, shard_mb: float) -> Request:
    settings = {
        "format": [FORMAT, journal.FORMAT], "kind": wanted.kind, "encoding": encoding, "shard_mb": shard_mb
    }  # fmt: skip
    decides = settings | {"options": wanted.options, "originals": _state(source.files())}
    return Request(command=json.dumps(settings | {"source": repr(source)}), decides=json.dumps(decides))


def _state(paths: Iterable[str]) -> str:
    """What changes when somebody changes one of the files: a digest of their sizes and times of change."""
    state = hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(path)
        except FileNotFoundError:  # a link that points at nothing: `load` will say so
            state.update(b"lost\n")
        else:
            state.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
    return state.hexdigest()


def _go_back_to_mended(split: Split, noted: Journal) -> None:
    """Where an original can be read now that could not before (a disk was away, say): to before its shard."""
    for position, _ in noted.unreadable:
        with suppress(UnreadableImageError):
            split.load(position)
            noted.forget_from(position)
            return


def _tell_what_is_there(journals: dict[str, Journal]) -> None:
    num_shards = sum(len(noted.entries) for noted in journals.values())
    if num_shards:
        num_images = sum(noted.num_samples for noted in journals.values())
        print(f"going on after {num_shards:,} shards, {num_images:,} images.", flush=True)


def _bar(collection: Collection, journals: dict[str, Journal]) -> tqdm[Any]:
    """Over the images of all splits."""
    return progress_bar(
        total=sum(map(len, collection.splits.values())), unit="img", description="write",
        initial=sum(noted.next_position for noted in journals.values()),
    )  # fmt: skip


def _pieces(collection: Collection, split: str, start: int) -> list[Piece]:
    """The images of a split from position `start` on."""
    stop = len(collection.splits[split])
    step = max(1, min(_PIECE_IMAGES, _PIECE_BYTES // (3 * collection.image_size**2)))
    return [Piece(split, range(first, min(first + step, stop))) for first in range(start, stop, step)]


def _make(collection: Collection, encoding: Encoding, piece: Piece) -> list[Made]:
    """Load, resize and encode: the work that is shared out."""
    made: list[Made] = []
    for position in piece.positions:
        try:
            image, label = collection.splits[piece.split].load(position)
        except UnreadableImageError as error:
            made.append(str(error))
        else:
            made.append(encode_sample(position, image, label, encoding))
    return made


class _Reading:
    """The samples of a split as they come; originals that cannot be read go into the report, their keys stay free."""

    def __init__(self, made: Iterable[list[Made]], position: int, report: UnreadableReport, bar: tqdm[Any]) -> None:
        self._made, self._report, self._bar = made, report, bar
        self.position = position  # behind the last image taken

    def __iter__(self) -> Iterator[EncodedSample]:
        for piece in self._made:
            self._bar.update(len(piece))
            for image in piece:
                self.position += 1
                if isinstance(image, str):
                    self._report.add(self.position - 1, image)
                else:
                    yield image


def _write_split(
    made: Iterable[list[Made]], folder: Path, noted: Journal, report: UnreadableReport, bar: tqdm[Any], *,
    shard_bytes: int,
) -> None:  # fmt: skip
    """Write what is made behind the shards already noted, and note each shard."""
    report.extend(noted.unreadable)
    reading = _Reading(made, noted.next_position, report, bar)
    num_told = before = len(report.noted)
    for written in written_shards(reading, folder, shard_bytes=shard_bytes, first=len(noted.entries)):
        noted.add(written, reading.position, report.noted[num_told:])
        num_told = len(report.noted)
    if not noted.entries:
        raise DataError(
            f"none of the {reading.position} images of {folder.name} can be read; the first: {report.noted[before][1]}"
        )


def _describe(
    name: str, info: SourceInfo, collection: Collection, encoding: Encoding, noted: Journal, folder: Path
) -> Manifest:  # fmt: skip
    """Write the index and, last, the manifest of a split."""
    written = join_shards(noted.written())
    manifest = Manifest(
        format=FORMAT,
        name=name,
        split=folder.name,
        num_samples=len(written.index),
        image_size=collection.image_size,
        num_channels=3,
        num_classes=len(collection.class_names),
        class_names=collection.class_names,
        encoding=encoding,
        preprocessing=collection.preprocessing,
        source=info,
        fingerprint=written.fingerprint,
        index_sha256=hashlib.sha256(written.index.save(folder)).hexdigest(),
        shards=written.shards,
    )
    manifest.save(folder)
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare", description="Write images as shards with an index and a manifest."
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for kind, source in SOURCES.items():
        command = sources.add_parser(kind, help=(source.__doc__ or "").splitlines()[0])
        command.add_argument("--out", type=Path, required=True, help="folder that will hold train/ and test/")
        command.add_argument("--shard-mb", type=float, default=32.0, help="size of a shard in MB (default 32)")
        command.add_argument(
            "--encoding", choices=("png", "npy"), default="png",
            help="how images are stored: png (smaller), or npy, raw pixels (faster to read); default png",
        )  # fmt: skip
        command.add_argument(
            "--num-processes", type=int, default=available_cpus(),
            help="processes that load, resize and encode (default: the CPUs there are, %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--max-unreadable", type=int, default=100,
            help="images that may be left out because they cannot be read (default 100)",
        )  # fmt: skip
        source.add_arguments(command)
    return parser


def _on_sigterm(*_: object) -> NoReturn:
    raise KeyboardInterrupt  # clean up as for Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    if not 0 < args.shard_mb < math.inf:
        raise DataError(f"--shard-mb is {args.shard_mb}; it must be a positive number.")
    for flag, value, least in (
        ("--num-processes", args.num_processes, 1), ("--max-unreadable", args.max_unreadable, 0)
    ):  # fmt: skip
        if value < least:
            raise DataError(f"{flag} is {value}; it must be at least {least}.")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    prepare(
        SOURCES[args.source].from_arguments(args), args.out, shard_mb=args.shard_mb, encoding=args.encoding,
        num_processes=args.num_processes, max_unreadable=args.max_unreadable,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run_cli(main)
