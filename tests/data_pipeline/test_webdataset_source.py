"""Shards that others made: read in their order, with their keys and labels."""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import main
from data_pipeline.sources.webdataset_shards import WebDatasetShards, expanded

KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def encoded(level: int, extension: str) -> bytes:
    image = Image.new("RGB", (12, 10), (level, level, level))
    buffer = io.BytesIO()
    if extension == "npy":
        np.save(buffer, np.asarray(image))
    else:
        image.save(buffer, format=KINDS[extension], quality=100, lossless=True)
    return buffer.getvalue()


def write_shard(path: Path, levels: range, extension: str, *, labelled: bool = True) -> None:
    path.parent.mkdir(exist_ok=True)
    with TarWriter(str(path)) as shard:
        for level in levels:
            sample = {"__key__": f"set/{level:04d}", extension: encoded(level, extension), "txt": "a caption"}
            shard.write(sample | ({"cls": level % 3} if labelled else {}))


def source(*arguments: str) -> WebDatasetShards:
    parser = argparse.ArgumentParser()
    WebDatasetShards.add_arguments(parser)
    return WebDatasetShards.from_arguments(parser.parse_args(["--size", "8", *arguments]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards, one a kind of image, of four samples each."""
    folder = tmp_path_factory.mktemp("theirs")
    for number, extension in enumerate(("jpg", "png", "webp", "npy", "jpeg")):
        write_shard(folder / f"train-{number:06d}.tar", range(4 * number, 4 * number + 4), extension)
    return folder


def test_all_kinds_in_their_order(shards: Path, tmp_path: Path) -> None:
    split = source("--from", str(shards), "--holdout", "0").open(tmp_path).splits["train"]
    loaded = [split.load(position) for position in range(len(split))]
    assert [int(image[0, 0, 0]) for image, _ in loaded] == list(range(20))
    assert [label for _, label in loaded] == [level % 3 for level in range(20)]


def test_resharded_with_a_test_pattern(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "webdataset", "--size", "16", "--out", str(tmp_path / "out"), "--num-processes", "1",
        "--from", str(shards / "train-{000000..000003}.tar"), "--test", str(shards / "train-*4.tar"),
    ]  # fmt: skip
    assert main(arguments) == 0
    train, test = ShardDataset(tmp_path / "out/train"), ShardDataset(tmp_path / "out/test")
    assert train.read(np.arange(16))[0][:, 0, 0, 0].tolist() == list(range(16))
    assert test.index.label.tolist() == [level % 3 for level in range(16, 20)]
    assert Manifest.load(tmp_path / "out/train").class_names == ["class 0", "class 1", "class 2"]
    assert str(shards) not in train.manifest.model_dump_json()  # no paths of this machine


def test_held_out_by_key(shards: Path, tmp_path: Path) -> None:
    one = source("--from", str(shards), "--holdout", "0.2").open(tmp_path).splits
    assert (len(one["train"]), len(one["test"])) == (16, 4)
    found = [int(split.load(p)[0][0, 0, 0]) for split in one.values() for p in range(len(split))]
    assert sorted(found) == list(range(20))
    assert found[:16] == sorted(found[:16])  # the order is theirs


def test_patterns() -> None:
    assert expanded("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expanded("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expanded("plain.tar") == ["plain.tar"]


def test_keys_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "latin").mkdir()
    with tarfile.open(tmp_path / "latin/0.tar", "w") as shard:
        for level in range(10):
            for extension, content in (("png", encoded(level, "png")), ("cls", b"0")):
                entry = tarfile.TarInfo(f"caf\udce9/{level}.{extension}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    splits = source("--from", str(tmp_path / "latin"), "--holdout", "0.5").open(tmp_path).splits
    levels = [int(split.load(row)[0][0, 0, 0]) for split in splits.values() for row in range(len(split))]
    assert sorted(levels) == list(range(10))


def test_unlabelled(tmp_path: Path) -> None:
    write_shard(tmp_path / "plain/0.tar", range(3), "png", labelled=False)
    collection = source("--from", str(tmp_path / "plain"), "--holdout", "0").open(tmp_path)
    assert collection.class_names == []
    assert collection.splits["train"].load(2)[1] == -1


def test_what_is_wrong_is_named(shards: Path, tmp_path: Path) -> None:
    def refused(told: str, *arguments: str) -> None:
        with pytest.raises(DataError, match=told):
            source(*arguments).open(tmp_path)

    (tmp_path / "empty").mkdir()
    refused("holds no .tar files", "--from", str(tmp_path / "empty"))
    refused(r"there is no shard .*train-000005.tar", "--from", str(shards / "train-{000003..000006}.tar"))
    refused(r"--test .* and --holdout 0.5: give one", "--from", str(shards), "--test", "x", "--holdout", "0.5")
    refused(r"--holdout is -1.0", "--from", str(shards), "--holdout", "-1")
    write_shard(tmp_path / "captions/0.tar", range(0), "png")
    refused(r"no shard holds images \(members ending in png", "--from", str(tmp_path / "captions"))
    write_shard(tmp_path / "mixed/0.tar", range(2), "png")
    write_shard(tmp_path / "mixed/1.tar", range(2, 4), "png", labelled=False)
    refused(r"2 of 4 samples have no label \(.cls member\), such as set/0002", "--from", str(tmp_path / "mixed"))
    refused("only one of --from", "--from", str(shards), "--test", str(tmp_path / "mixed/1.tar"))
    whole = (shards / "train-000001.tar").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/0.tar").write_bytes(whole[:1500])
    refused(r"cut/0.tar is damaged", "--from", str(tmp_path / "cut"))
