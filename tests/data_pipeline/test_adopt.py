"""Shards that others made: indexed when first seen, and refused clearly where they cannot be trained on."""

from __future__ import annotations

import errno
import io
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.adopt import adopt, main
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.fingerprint import sample_digest
from data_pipeline.index import Index
from data_pipeline.inspect import verify


def picture(number: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Two uneven shards of others: JPEG and PNG mixed, keys with folders, members that are no images."""
    folder = tmp_path / "theirs"
    for shard, numbers in enumerate([range(7), range(7, 10)]):
        members: dict[str, bytes] = {}
        for number in numbers:
            kind = "JPEG" if number % 3 == 0 else "PNG"
            members[f"part/{number:03d}.{'jpg' if kind == 'JPEG' else 'png'}"] = picture(number, kind=kind)
            members[f"part/{number:03d}.cls"] = str(number % 4).encode()
            members[f"part/{number:03d}.json"] = b"{}"
        write_tar(folder / f"train-{shard}.tar", members)
    return folder


def opened(place: str) -> str:
    return ShardDataset(place).manifest.fingerprint


def test_the_first_look_indexes_them(theirs: Path) -> None:
    dataset = ShardDataset(theirs)
    assert [shard.num_samples for shard in dataset.manifest.shards] == [7, 3]
    assert dataset.index.key.tolist() == [f"part/{number:03d}".encode() for number in range(10)]
    assert dataset.manifest.encoding == "any"
    assert (dataset.manifest.image_size, dataset.manifest.num_classes) == (8, 4)
    images, labels = dataset.read(np.arange(10))
    assert labels.tolist() == [number % 4 for number in range(10)]
    for number in (0, 1):
        with Image.open(io.BytesIO(picture(number, kind="JPEG" if number == 0 else "PNG"))) as image:
            np.testing.assert_array_equal(images[number], np.asarray(image).transpose(2, 0, 1))
    assert verify(dataset) == []
    before = (theirs / "index.npz").stat().st_mtime_ns
    ShardDataset(theirs)
    assert (theirs / "index.npz").stat().st_mtime_ns == before


def test_several_processes_may_see_them_first(theirs: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert len(set(pool.map(opened, [str(theirs)] * 3))) == 1


@pytest.mark.parametrize("encoding", ["png", "npy"])
def test_our_own_shards_are_known_again(prepared: Path, small_npy: Path, tmp_path: Path, encoding: str) -> None:
    split = (prepared if encoding == "png" else small_npy) / "train"
    for path in split.glob("*.tar"):
        shutil.copy(path, tmp_path)
    ours, again = ShardDataset(split).manifest, ShardDataset(tmp_path).manifest
    assert (again.encoding, again.fingerprint, again.shards) == (encoding, ours.fingerprint, ours.shards)
    assert (tmp_path / "index.npz").read_bytes() == (split / "index.npz").read_bytes()


def test_a_folder_apart_points_at_them(theirs: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog\nfox\nowl\n")
    assert main([str(theirs), "--out", str(tmp_path / "apart"), "--classes", str(names)]) == 0
    assert not (theirs / "manifest.json").exists()
    dataset = ShardDataset(tmp_path / "apart")
    assert dataset.manifest.class_names == ["cat", "dog", "fox", "owl"]
    pixels, label = dataset.read(np.array([8]))
    with Image.open(io.BytesIO(picture(8))) as image:
        assert sample_digest(pixels[0].transpose(1, 2, 0), int(label[0])) == sample_digest(np.asarray(image), 0)
    (theirs / "train-1.tar").unlink()
    with pytest.raises(DataError, match=r"theirs/train-1.tar is missing"):
        ShardDataset(tmp_path / "apart")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": picture(0, (8, 6))}, r"sample a: 8x6.*prepare webdataset"),
        ({"a.png": picture(0), "b.png": picture(1, (9, 9))}, r"sample b: 9x9, after 8 px"),
        ({"a.png": picture(0)[:-40]}, "sample a cannot be decoded"),
        ({"a.png": picture(0), "a.cls": b"cat"}, "is damaged or no tar file"),
        ({"a.png": picture(0), "a.cls": b"1", "b.png": picture(1)}, "sample b has no label"),
        ({"a.cls": b"1"}, "has a label but no image"),
        ({"a.txt": b"1"}, "holds no images"),
        ({"a.png": picture(0), "a.jpg": picture(0, kind="JPEG")}, "more than one image"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "x" / "a.tar", members)
    with pytest.raises(DataError, match=message):
        ShardDataset(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a.tar"]


def test_shards_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x" / "a.tar", {"a.png": picture(0)})
    write_tar(tmp_path / "x" / "b.tar", {"b.png": picture(1, (16, 16))})
    with pytest.raises(DataError, match=r"b.tar: its images: 16x16, after 8 px"):
        ShardDataset(tmp_path / "x")


def test_hard_links_are_samples_too(tmp_path: Path) -> None:
    path = tmp_path / "x" / "a.tar"
    write_tar(path, {"a.png": picture(0), "b.png": picture(1)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    images, _ = ShardDataset(tmp_path / "x").read(np.arange(3))
    np.testing.assert_array_equal(images[2], images[0])


def test_what_we_prepared_is_not_overwritten(own_copy: Path, tmp_path: Path) -> None:
    before = (own_copy / "train/manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"train holds a prepared data set \(generated\).*--out"):
        adopt(own_copy / "train")
    assert (own_copy / "train/manifest.json").read_bytes() == before
    for _ in range(2):  # what was adopted may be adopted again
        adopt(own_copy / "train", tmp_path / "apart")


def test_names_that_no_manifest_takes_are_refused_first(tmp_path: Path) -> None:
    write_tar(tmp_path / "x" / "my shard 0.tar", {"a.png": b"not decoded"})
    with pytest.raises(DataError, match=r"my shard 0.tar: a shard's name is made of letters"):
        adopt(tmp_path / "x")


def test_too_few_class_names(theirs: Path) -> None:
    with pytest.raises(DataError, match="labels go from 0 to 3, but 2 classes are named"):
        adopt(theirs, class_names=["cat", "dog"])


def test_a_lost_manifest_is_not_made_up_again(own_copy: Path) -> None:
    (own_copy / "train/manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        ShardDataset(own_copy / "train")


def test_a_folder_that_cannot_be_written(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Index, "save", refuse)
    with pytest.raises(DataError, match=r"cannot be written .*: python -m data_pipeline.adopt .*theirs --out FOLDER"):
        ShardDataset(theirs)
