"""Tar shards that others made -> an index and a manifest, so that they can be trained on as they are.

    python -m data_pipeline.adopt SHARDS [--out FOLDER] [--classes FILE]

SHARDS is a folder of *.tar files in the WebDataset layout (KEY.png or .jpg, .webp, .npy, with KEY.cls), all images
square and of one size; others go through `python -m data_pipeline.prepare webdataset`. Every image is decoded once,
for the checks and the fingerprint. The two files are written beside the shards, or into FOLDER, which then points at
them.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_pipeline import codec
from data_pipeline.codec import Encoding
from data_pipeline.errors import DataError, run_cli
from data_pipeline.files import sha256_file
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.index import FILE_NAME as INDEX_FILE
from data_pipeline.index import NO_LABEL, Index, Member, build_index, scan_shard, shown
from data_pipeline.manifest import ADOPTED, FILE_NAME, FORMAT, Manifest, PlainFileName, Shard, SourceInfo
from data_pipeline.processes import WorkerPool, available_cpus
from data_pipeline.progress import progress_bar


@dataclass(frozen=True)
class Seen:
    """What one shard holds."""

    shard: Shard
    members: list[Member]
    digests: list[bytes]
    size: int  # pixels a side
    encodings: frozenset[Encoding]


def shards_in(folder: Path) -> list[Path]:
    """The tar files of a folder, in order."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def adopt(folder: Path, out: Path | None = None, *, class_names: Sequence[str] = (), num_processes: int = 1) -> None:
    """Write the index and, last, the manifest of the shards in `folder` into `out` (None: beside the shards).

    Raises:
        DataError: there are none, or one is damaged, or an image is not square or of another size than the first; or
            `out` holds a manifest that was not made here.
        OSError: `out` cannot be written.
    """
    paths = shards_in(folder)
    if not paths:
        raise DataError(f"{folder} holds no *.tar shards. Name the folder that does.")
    _check_names(paths)
    _refuse_prepared(out or folder)
    seen: list[Seen] = []
    with WorkerPool(_look_at, num_processes) as pool:
        shards = pool.map(paths)
        for one in progress_bar(shards, total=len(paths), unit="shard", description=f"index {folder.name}"):
            if seen and one.size != seen[0].size:
                raise _unsuitable(paths[len(seen)], "its images", one.size, one.size, f"{seen[0].size} px before")
            seen.append(one)
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    index = build_index([one.members for one in seen])
    names = list(class_names) or [str(number) for number in range(int(index.label.max()) + 1)]
    _check_labels(folder, index, names)
    encodings = frozenset[Encoding]().union(*(one.encodings for one in seen))
    Manifest(
        format=FORMAT,
        name=folder.resolve().name,
        split=folder.resolve().name,
        num_samples=len(index),
        image_size=seen[0].size,
        num_channels=3,
        num_classes=len(names),
        class_names=names,
        encoding=next(iter(encodings)) if len(encodings) == 1 else "any",
        preprocessing="unknown: made by others",
        source=SourceInfo(kind=ADOPTED, options={}, origin=f"shards in {folder.resolve().name}"),
        fingerprint=fingerprint(digest for one in seen for digest in one.digests),
        index_sha256=hashlib.sha256(index.save(out)).hexdigest(),
        shards=[one.shard for one in seen],
        shards_at=None if out.resolve() == folder.resolve() else str(folder.resolve()),
    ).save(out)


def adopt_on_first_sight(folder: Path) -> None:
    """Adopt the shards of a folder that has neither manifest nor index. Does nothing where it has, or no shard.

    Raises:
        DataError: as `adopt`; or the folder cannot be written.
    """
    if (folder / FILE_NAME).exists() or (folder / INDEX_FILE).exists() or not folder.is_dir() or not shards_in(folder):
        return  # an index alone: what we prepared has been damaged
    with _alone(folder):
        if (folder / FILE_NAME).exists():
            return  # another process was faster
        try:
            adopt(folder, num_processes=available_cpus())
        except PermissionError as error:
            raise DataError(
                f"{folder} holds shards without an index and cannot be written ({error.strerror}). Index them into "
                f"another folder and name that one instead: python -m data_pipeline.adopt {folder} --out FOLDER"
            ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process of this machine is in here for the same folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _look_at(path: Path) -> Seen:
    """Index a shard and decode all of its images."""
    members = list(scan_shard(path, codec.EXTENSIONS["any"]))
    if not members:
        raise DataError(f"{path} holds no images ({', '.join(codec.EXTENSIONS['any'])}).")
    size, digests, encodings = 0, [], set()
    with open(path, "rb") as file:
        for member in members:
            file.seek(member.offset)
            payload = file.read(member.size)
            try:
                image, encoding = codec.recognise(payload)
            except (ValueError, OSError, SyntaxError) as error:
                raise DataError(
                    f"{path}: sample {shown(member.key)} cannot be decoded ({error}): get the shard anew."
                ) from None
            height, width, _ = image.shape
            size = size or height
            if not height == width == size:
                raise _unsuitable(path, f"sample {shown(member.key)}", width, height, f"{size} px before")
            digests.append(sample_digest(image, member.label))
            encodings.add(encoding)
    num_bytes = path.stat().st_size
    shard = Shard(file=path.name, num_samples=len(members), num_bytes=num_bytes, sha256=sha256_file(path))
    return Seen(shard, members, digests, size, frozenset(encodings))


def _check_names(paths: list[Path]) -> None:
    """Before hours of decoding: the manifest takes plain names alone."""
    for path in paths:
        try:
            TypeAdapter(PlainFileName).validate_python(path.name)
        except ValidationError:
            raise DataError(
                f"{shown(str(path))}: a shard's name is made of letters, digits, dots, - and _, and begins with a "
                "letter or digit. Rename it."
            ) from None


def _refuse_prepared(out: Path) -> None:
    """A manifest of ours knows the class names and where the images came from; the tar files do not."""
    if (out / FILE_NAME).exists() and (kind := Manifest.load(out).source.kind) != ADOPTED:
        raise DataError(
            f"{out} holds a prepared data set ({kind}), which can be used as it is. To adopt its shards all the same, "
            "name another folder with --out."
        )


def _unsuitable(path: Path, what: str, width: int, height: int, expected: str) -> DataError:
    return DataError(
        f"{path}: {what}: {width}x{height}, after {expected}. A network takes square images of one size: make such "
        f"shards of these with python -m data_pipeline.prepare webdataset --from {path.parent} --size SIZE --out OUT"
    )


def _check_labels(folder: Path, index: Index, class_names: Sequence[str]) -> None:
    labelled = index.label != NO_LABEL
    if labelled.any() and not labelled.all():
        key = shown(index.key[int(labelled.argmin())])
        raise DataError(f"{folder}: sample {key} has no label, but others have one: give all of them one, or none.")
    if labelled.any() and not 0 <= int(index.label.min()) <= int(index.label.max()) < len(class_names):
        raise DataError(
            f"{folder}: labels go from {index.label.min()} to {index.label.max()}, but {len(class_names)} classes are "
            "named (--classes)."
        )


def _class_names(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path}: {error}. It is a text file with one class name a line.") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.adopt", description="Write an index and a manifest for tar shards of others."
    )
    parser.add_argument("shards", type=Path, help="the folder of *.tar shards")
    parser.add_argument("--out", type=Path, help="folder for the two files (default: beside the shards)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="the class names, one a line")
    parser.add_argument("--num-processes", type=int, default=available_cpus(), help="default: the CPUs at hand")
    args = parser.parse_args(arguments)
    if args.num_processes < 1:
        raise DataError(f"--num-processes is {args.num_processes}; it must be at least 1.")
    adopt(args.shards, args.out, class_names=_class_names(args.classes), num_processes=args.num_processes)
    print(f"{args.out or args.shards} is ready")
    return 0


if __name__ == "__main__":
    run_cli(main)
