"""The official downsampled ImageNet: pickles and npz, loose or packed, mapped rather than loaded."""

from __future__ import annotations

import argparse
import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import main
from data_pipeline.sources.downsampled_imagenet import BatchSplit, DownsampledImageNet

SIZE = 8
PICTURE = np.zeros((1, 192), np.uint8)
ODD: list[tuple[str, Any, Any]] = [  # what is told, data, labels
    (r"found uint8 \[0, 192\]", PICTURE[:0], []),
    (r"found uint8 \[2, 0\]", np.zeros((2, 0), np.uint8), [1, 1]),
    (r"labels of <U1", PICTURE, ["7"]),
    (r"labels of float64", np.zeros((2, 192), np.uint8), [1.5, float("nan")]),
    (r"labels of bool", PICTURE, [True]),
    (r"found int64 \[2\]", [1, 2], [1, 2]),
    ("a list within a list", PICTURE, [[1], [2, 3]]),
]
Batches = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def batches() -> Batches:
    """Ten training batches of uneven length and the validation batch."""
    rng = np.random.default_rng(0)

    def batch(length: int) -> dict[str, Any]:
        data = rng.integers(0, 256, (length, 3 * SIZE * SIZE), dtype=np.uint8)
        return {"data": data, "labels": rng.integers(1, 1001, length).tolist(), "mean": data.mean(axis=0)}

    return {f"train_data_batch_{number}": batch(2 + number % 3) for number in range(1, 11)} | {"val_data": batch(5)}


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Of an array of uint8, whatever follows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    return buffer.getvalue()


def write_pickles(folder: Path, batches: Batches, protocol: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in batches.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder


def write_npz(folder: Path, batches: Batches, *, compressed: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in batches.items():
        (np.savez_compressed if compressed else np.savez)(folder / f"{name}.npz", **content)
    return folder


def write_zips(folder: Path, files: Path) -> Path:
    """As published: the training batches in two parts, the validation batch in a third."""
    folder.mkdir()
    for archive, wanted in (
        ("Imagenet8_train_part1.zip", range(1, 6)), ("Imagenet8_train_part2.zip", range(6, 11)),
        ("Imagenet8_val.zip", range(0)),
    ):  # fmt: skip
        names = [f"train_data_batch_{number}" for number in wanted] or ["val_data"]
        with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in names:
                packed.write(files / name, f"Imagenet8_train/{name}")
    return folder


def source(folder: Path) -> DownsampledImageNet:
    parser = argparse.ArgumentParser()
    DownsampledImageNet.add_arguments(parser)
    return DownsampledImageNet.from_arguments(parser.parse_args(["--from", str(folder)]))


def check(folder: Path, workspace: Path, batches: Batches) -> None:
    """All images and labels, in the order of the batches' numbers."""
    workspace.mkdir(exist_ok=True)
    collection = source(folder).open(workspace)
    assert collection.image_size == SIZE
    for name, wanted in (
        ("train", [batches[f"train_data_batch_{number}"] for number in range(1, 11)]), ("test", [batches["val_data"]]),
    ):  # fmt: skip
        data = np.concatenate([batch["data"] for batch in wanted])
        labels = [label - 1 for batch in wanted for label in batch["labels"]]
        split = collection.splits[name]
        assert len(split) == len(labels)
        for position, label in enumerate(labels):
            image, found = split.load(position)
            np.testing.assert_array_equal(image, data[position].reshape(3, SIZE, SIZE).transpose(1, 2, 0))
            assert found == label


@pytest.mark.parametrize("protocol", range(5))
def test_pickles_of_every_protocol(batches: Batches, tmp_path: Path, protocol: int) -> None:
    check(write_pickles(tmp_path / "data", batches, protocol), tmp_path / "work", batches)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(batches: Batches, tmp_path: Path, compressed: bool) -> None:
    check(write_npz(tmp_path / "data", batches, compressed=compressed), tmp_path / "work", batches)
    assert any((tmp_path / "work").iterdir()) == compressed  # the others are read where they lie


def test_archives_as_published(batches: Batches, tmp_path: Path) -> None:
    files = write_pickles(tmp_path / "loose", batches)
    check(write_zips(tmp_path / "zips", files), tmp_path / "work", batches)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/imagenet8_all.tar", "w") as archive:
        archive.add(files, "x")
    check(tmp_path / "tars", tmp_path / "work2", batches)


def test_batches_are_mapped_not_loaded(tmp_path: Path) -> None:
    """As at 64 pixels, where a batch has 1.5 GB."""
    large = {"data": np.zeros((400, 3 * 64 * 64), np.uint8), "labels": [1] * 400, "mean": np.zeros(3)}
    batches = {"train_data_batch_1": large, "val_data": large}
    for folder in (
        write_pickles(tmp_path / "pickles", batches), write_npz(tmp_path / "npz", batches, compressed=False),
    ):  # fmt: skip
        split = source(folder).open(tmp_path).splits["train"]
        assert isinstance(split, BatchSplit)
        base: Any = split.batches[0].data
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)


def test_prepared_and_named_honestly(batches: Batches, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pickles(tmp_path / "data", batches)
    arguments = ["imagenet-downsampled", "--from", str(folder), "--num-processes", "1", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    train = Manifest.load(tmp_path / "out/train")
    assert train.preprocessing == "official-downsampled"
    assert (train.num_classes, train.class_names[0]) == (1000, "map_clsloc.txt 1")  # not a rank of WordNet ids
    rows = [f"n{number:08d} {number} kit_fox" for number in range(1, 1001)]
    (folder / "map_clsloc.txt").write_text("\n".join(rows) + "\n")
    assert main([*arguments, str(tmp_path / "named")]) == 0
    assert Manifest.load(tmp_path / "named/train").class_names[1] == "n00000002 kit fox"
    assert "warning" not in capsys.readouterr().out
    (folder / "train_data_batch_4").unlink()
    assert main([*arguments, str(tmp_path / "fewer")]) == 0
    assert "warning: 9 training batches, the whole set has 10" in capsys.readouterr().out


def test_what_is_missing_or_damaged_is_named(batches: Batches, tmp_path: Path) -> None:
    def refused(told: str, folder: Path) -> None:
        with pytest.raises(DataError, match=told):
            source(folder).open(tmp_path)

    refused("there is no such folder", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(r"holds no train_data_batch_1 ... \(pickled or .npz\)", tmp_path / "empty")
    folder = write_pickles(tmp_path / "data", batches)
    whole = (folder / "val_data").read_bytes()
    refused("holds train_data_batch_1.npz twice", write_npz(folder, {"train_data_batch_1": {}}, compressed=False))
    (folder / "train_data_batch_1.npz").unlink()
    for told, content in (
        ("val_data is damaged or no pickle", whole[:-200]),
        ("val_data is damaged or no pickle.*holds no dictionary but a list", pickle.dumps([1, 2])),
        ("has no `data` and `labels`", pickle.dumps({"data": None})),
        *((told, pickle.dumps({"data": data, "labels": labels}, 3)) for told, data, labels in ODD),
        (
            r"found uint8 \[5, 100\] and \[5\]",
            pickle.dumps({"data": np.zeros((5, 100), np.uint8), "labels": [1] * 5}, 3),
        ),
        (r"\[5, 192\] and \[4\]", pickle.dumps({"data": np.zeros((5, 192), np.uint8), "labels": [1] * 4}, 3)),
        ("labels run from 0 to 7", pickle.dumps({"data": np.zeros((2, 192), np.uint8), "labels": [0, 7]}, 3)),
        (r"mixes sizes \(\[4, 8\] pixels\)", pickle.dumps({"data": np.zeros((1, 48), np.uint8), "labels": [1]}, 3)),
    ):
        (folder / "val_data").write_bytes(content)
        refused(told, folder)
    (folder / "val_data").unlink()
    np.savez(folder / "val_data.npz", data=np.array([{}], dtype=object), labels=np.array([1]))
    refused("holds no plain arrays", folder)
    (folder / "val_data.npz").write_bytes(b"not a zip")
    refused("val_data.npz is damaged or no zip", folder)
    for shape in ((10**20, 192), (-1, 192), (6, 192), (2**62, 2**62)):  # of five rows; behind them lie the labels
        with zipfile.ZipFile(folder / "val_data.npz", "w") as packed:
            packed.writestr("data.npy", npy_header(shape) + bytes(5 * 192))
            packed.writestr("labels.npy", npy_header((5,)) + bytes([1] * 5))
        refused(r"holds no plain arrays .*an array \[.* of uint8 in \d,\d+ bytes", folder)
    with zipfile.ZipFile(folder / "val_data.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("data.npy", npy_header((5, 192)) + bytes(range(192)) * 5)
    packed_bytes = (folder / "val_data.npz").read_bytes()
    (folder / "val_data.npz").write_bytes(packed_bytes[:60] + bytes(20) + packed_bytes[80:])
    refused("val_data.npz is damaged", folder)
