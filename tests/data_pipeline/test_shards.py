"""Shards: deterministic bytes, readable by any WebDataset reader, described exactly by their index."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from trees import same_tree

from data_pipeline import tar
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.index import Index, build_index, scan_shard, shown
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.shards import EncodedSample, encode_sample, write_shards, written_shards
from data_pipeline.sources.generated import Generated


def test_same_input_same_bytes(small_source: Generated, prepared: Path, tmp_path: Path) -> None:
    prepare(small_source, tmp_path / "again", shard_mb=0.06)
    assert same_tree(prepared, tmp_path / "again")


def test_fingerprint_does_not_depend_on_shard_size(small_source: Generated, prepared: Path, tmp_path: Path) -> None:
    prepare(small_source, tmp_path / "one", shard_mb=10)
    first, second = Manifest.load(prepared / "train"), Manifest.load(tmp_path / "one/train")
    assert len(first.shards) > len(second.shards) == 1
    assert first.fingerprint == second.fingerprint


def test_webdataset_reads_the_same_samples(dataset: ShardDataset) -> None:
    urls = [dataset.shard_place(number) for number in range(len(dataset.manifest.shards))]
    images, labels = dataset.read(np.arange(len(dataset)))
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(len(dataset))]
    assert [int(sample["cls"]) for sample in found] == labels.tolist()
    for sample, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), image.transpose(1, 2, 0))


def test_webdataset_reads_raw_images_too(small_npy: Path, prepared: Path) -> None:
    raw, png = ShardDataset(small_npy / "train"), ShardDataset(prepared / "train")
    assert raw.manifest.encoding == "npy"
    assert raw.manifest.fingerprint == png.manifest.fingerprint
    images, labels = raw.read(np.arange(len(raw)))
    np.testing.assert_array_equal(images, png.read(np.arange(len(png)))[0])
    urls = [raw.shard_place(number) for number in range(len(raw.manifest.shards))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    np.testing.assert_array_equal(np.stack([sample["npy"] for sample in found]), images)
    assert [sample["cls"] for sample in found] == labels.tolist()


def test_every_split_is_labelled_evenly_and_no_image_is_in_both(prepared: Path) -> None:
    train, test = ShardDataset(prepared / "train"), ShardDataset(prepared / "test")
    assert np.bincount(train.index.label).tolist() == [68, 68, 67]
    images = [train.read(np.arange(len(train)))[0], test.read(np.arange(len(test)))[0]]
    assert len(np.unique(np.concatenate(images).reshape(223, -1), axis=0)) == 223


def test_unlabelled_samples_have_no_label(tmp_path: Path) -> None:
    prepare(Generated(size=8, num_train=5, num_test=2, num_classes=0, seed=0), tmp_path / "plain")
    plain = ShardDataset(tmp_path / "plain/train")
    assert plain.read(np.arange(5))[1].tolist() == [-1] * 5
    with tarfile.open(tmp_path / "plain/train/shard-000000.tar") as archive:
        assert all(name.endswith(".png") for name in archive.getnames())


def test_shards_are_near_the_wanted_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    written = write_shards((encode_sample(n, x, 0) for n, x in enumerate(images)), tmp_path, shard_bytes=40_000)
    sizes = [shard.num_bytes for shard in written.shards]
    assert sum(shard.num_samples for shard in written.shards) == 60
    assert all(40_000 <= size <= 40_000 + 2 * 10_240 for size in sizes[:-1])  # a sample and tar's padding more


def test_no_sample_is_taken_before_its_shard_is_begun(tmp_path: Path) -> None:
    """So that whoever notes a complete shard knows how far the source was read."""
    taken: list[int] = []

    def samples() -> Iterator[EncodedSample]:
        for number in range(20):
            taken.append(number)
            yield encode_sample(number, np.full((16, 16, 3), number, np.uint8), 0)

    counts = []
    for written in written_shards(samples(), tmp_path, shard_bytes=9_000):
        counts.append(written.shard.num_samples)
        assert len(taken) == sum(counts)
    assert len(counts) > 2


def test_index_survives_saving(dataset: ShardDataset, tmp_path: Path) -> None:
    content = dataset.index.save(tmp_path)
    again = Index.open(tmp_path / "index.npz")
    assert again.to_bytes() == content
    np.testing.assert_array_equal(again.offset, dataset.index.offset)


def test_index_of_shards_that_others_made(tmp_path: Path) -> None:
    """Folders in names, other members, image before label and label before image: all are WebDataset's layout."""
    path = tmp_path / "theirs.tar"
    image = encode_sample(0, np.zeros((4, 4, 3), np.uint8), 0).payload
    members = {
        "a/x.json": b"{}", "a/x.png": image, "a/x.cls": b"7", "a/y.cls": b"3\n", "a/y.png": image, "a/z.png": image,
    }  # fmt: skip
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    found = list(scan_shard(path, ("png",)))
    assert [(member.key, member.label) for member in found] == [("a/x", 7), ("a/y", 3), ("a/z", -1)]
    content = path.read_bytes()
    assert all(content[member.offset : member.offset + member.size] == image for member in found)


@pytest.mark.parametrize("label", [b"1000000", b"-1000000", b"1" + b"0" * 30])
def test_labels_beyond_all_classes_are_refused(tmp_path: Path, label: bytes) -> None:
    path = tmp_path / "theirs.tar"
    path.write_bytes(tar.header("x/7.cls", len(label)) + label + tar.padding(len(label)) + tar.end_mark(1024))
    with pytest.raises(DataError, match=rf"theirs.tar .*sample x/7 has label b'{label.decode()}'"):
        list(scan_shard(path, ("png",)))


def test_keys_that_are_not_utf_8(tmp_path: Path) -> None:
    image = encode_sample(0, np.zeros((4, 4, 3), np.uint8), 0).payload
    with tarfile.open(tmp_path / "theirs.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo("b\u00e4r.png")
        entry.size = len(image)
        archive.addfile(entry, io.BytesIO(image))
    (member,) = scan_shard(tmp_path / "theirs.tar", ("png",))
    assert build_index([[member]]).key.tolist() == [b"b\xe4r"]
    assert shown(member.key) == shown(b"b\xe4r") == r"b\xe4r"


def test_damaged_header_is_refused(prepared: Path, tmp_path: Path) -> None:
    """Python's tarfile takes it for the archive's end."""
    content = bytearray((prepared / "train/shard-000000.tar").read_bytes())
    content[(prepared / "train/shard-000000.tar").read_bytes().index(b"000000009.png") + 130] ^= 1
    (tmp_path / "flipped.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"flipped.tar is damaged"):
        list(scan_shard(tmp_path / "flipped.tar", ("png",)))


@pytest.mark.parametrize("keep", [0, 300, 700, 3000, 4 * 512, 40 * 512])
def test_cut_off_tar_is_refused(prepared: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes((prepared / "train/shard-000000.tar").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cut.tar"):
        list(scan_shard(path, ("png",)))
