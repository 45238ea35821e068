"""Samples as files: an npz in the layout in which published samples come, or shards like those of training data.

Images come in as a stream of parts and go out as they come: neither needs memory for all of them, and a base of small
images is mapped, not read.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import fsync_file
from data_pipeline.index import NO_LABEL
from data_pipeline.manifest import FORMAT, Manifest, SourceInfo
from data_pipeline.shards import EncodedSample, encode_sample, write_shards

Images = NDArray[np.uint8]  # [n, H, W, 3]
SHARD_BYTES = 32_000_000
_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name; the lengths of name and extras end it


def read_samples(path: Path, *, option: str = "--base") -> tuple[Tensor, list[int] | None]:
    """Images uint8 [N, 3, H, W], mapped from the file, and classes [N], if any, of an npz of samples.

    `option` names the file in messages. Raises UserError for a file that is no such npz, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{option} {path} is damaged: {damaged} in it does not match its checksum.")
        with np.load(path, allow_pickle=False) as file:
            labels = file["arr_1"] if "arr_1" in file.files else None
        images = _mapped(path, "arr_0.npy")
    except FileNotFoundError:
        raise UserError(f"{option} {path}: no such file.") from None
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{option} {path} is not an npz of samples (arr_0, uint8 [N, H, W, 3]): {error}.") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(
            f"{option} {path}: arr_0 is {images.dtype} {list(images.shape)}; samples are uint8 [N, size, size, 3]."
        )
    if images.size == 0:
        raise UserError(f"{option} {path} holds no images: arr_0 is {list(images.shape)}.")
    if labels is not None:
        _check_classes(f"{option} {path}", labels, num=len(images))
    return torch.from_numpy(images).permute(0, 3, 1, 2), None if labels is None else labels.tolist()


def _mapped(path: Path, name: str) -> NDArray[Any]:
    """An array of an npz as a copy-on-write map of the file; read whole if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        with archive.open(info) as member:
            version = npy.read_magic(member)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran_order, dtype = read_header(member)
            start = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or dtype.hasobject or 0 in shape:
            with archive.open(info) as member:
                whole: NDArray[Any] = npy.read_array(member, allow_pickle=False)
                return whole
    with open(path, "rb") as file:
        file.seek(info.header_offset + _LOCAL_HEADER - 4)
        lengths = np.frombuffer(file.read(4), dtype="<u2")  # of the member's name and of its extras
    offset = info.header_offset + _LOCAL_HEADER + int(lengths.sum(dtype=np.int64)) + start
    return np.memmap(path, dtype, "c", offset, shape, "F" if fortran_order else "C")


def _check_classes(what: str, labels: NDArray[Any], *, num: int) -> None:
    if labels.shape != (num,):
        raise UserError(f"{what}: {num} images in arr_0 but classes {list(labels.shape)} in arr_1.")
    if labels.dtype.kind not in "iu" or labels.min() < -1:
        raise UserError(
            f"{what}: arr_1 ({labels.dtype}) must hold classes, whole numbers from 0 (-1: no class); without arr_1, "
            "image i has class i modulo their number."
        )


def write_npz(
    path: Path, parts: Iterable[Images], *, num: int, image_size: int, labels: Sequence[int] | None, scratch: Path
) -> None:
    """Write `num` images and their classes as `arr_0` and `arr_1`: the bytes that `np.savez` would write of all.

    Written in the folder `scratch`, on the same disk, and moved to its place when complete.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f"{os.getpid()}-{path.name}"
    shape, written = (num, image_size, image_size, 3), 0
    with zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images in parts:
                assert images.shape[1:] == shape[1:]
                member.write(np.ascontiguousarray(images).data)
                written += len(images)
        assert written == num
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                npy.write_array(member, np.array(labels, dtype=np.int64))
    fsync_file(temporary)
    temporary.replace(path)
    fsync_file(path.parent)


def write_split(
    folder: Path, parts: Iterable[Images], *, numbers: range, image_size: int, labels: Sequence[int] | None,
    num_classes: int, name: str, source: SourceInfo,
) -> Manifest:  # fmt: skip
    """Write images as a data split (shards, index, manifest) into an existing folder; keys are the images' numbers."""
    encoded = _encoded(parts, numbers, labels or [NO_LABEL] * len(numbers))
    written = write_shards(encoded, folder, shard_bytes=SHARD_BYTES)
    manifest = Manifest(
        format=FORMAT,
        name=name,
        split="samples",
        num_samples=len(written.index),
        image_size=image_size,
        num_channels=3,
        num_classes=num_classes if labels else 0,
        class_names=[str(number) for number in range(num_classes)] if labels else [],
        encoding="png",
        preprocessing="none",
        source=source,
        fingerprint=written.fingerprint,
        index_sha256=hashlib.sha256(written.index.save(folder)).hexdigest(),
        shards=written.shards,
    )
    manifest.save(folder)
    return manifest


def _encoded(parts: Iterable[Images], numbers: range, labels: Sequence[int]) -> Iterator[EncodedSample]:
    images = (image for part in parts for image in part)
    for number, image, label in zip(numbers, images, labels, strict=True):
        yield encode_sample(number, image, label)
