"""ImageNet in all its packings: small stand-ins of the official layouts give one and the same data set."""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import main
from data_pipeline.sources.base import Collection
from data_pipeline.sources.imagenet import ImageNet

WNIDS = ["n01440764", "n01443537", "n02119789"]  # tench, goldfish, kit fox
KIT_NUMBERS = {"n02119789": 1, "n01440764": 2, "n01443537": 3}  # the kit's own order is another one
WORDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02119789": "kit fox"}
TRAIN = {
    f"{wnid}_{number}.JPEG": (wnid, (40 * row, 10 * number, 200))
    for row, wnid in enumerate(WNIDS)
    for number in (3, 12, 1)
}
VAL = {
    f"ILSVRC2012_val_{number:08d}.JPEG": (WNIDS[number * 2 % 3], (250, 10 * number, 0)) for number in range(1, 6)
}  # fmt: skip


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(buffer, format="JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def class_tars() -> dict[str, bytes]:
    """In no order, neither within a class nor among them."""
    return {
        f"{wnid}.tar": tar({name: jpeg(colour) for name, (one, colour) in TRAIN.items() if one == wnid})
        for wnid in reversed(WNIDS)
    }


def meta() -> bytes:
    """meta.mat: leaves and one inner node."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = [(number, wnid, WORDS[wnid], "gloss", 0) for wnid, number in KIT_NUMBERS.items()]
    rows.append((4, "n00001740", "entity", "that which is", 3))
    synsets = np.zeros((len(rows), 1), dtype=[(name, object) for name in fields])
    for number, row in enumerate(rows):
        synsets[number, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def devkit() -> dict[str, bytes]:
    truth = "".join(f"{KIT_NUMBERS[wnid]}\n" for wnid, _ in VAL.values())
    return {"data/ILSVRC2012_validation_ground_truth.txt": truth.encode(), "data/meta.mat": meta()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three archives as they are published."""
    folder = tmp_path_factory.mktemp("official")
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, content in devkit().items():
            entry = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    val = tar({name: jpeg(colour) for name, (_, colour) in reversed(VAL.items())})
    write(folder, {"ILSVRC2012_img_train.tar": tar(class_tars()), "ILSVRC2012_img_val.tar": val})
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders for both, as many keep them."""
    folder = tmp_path_factory.mktemp("unpacked")
    write(folder, {f"train/{wnid}/{name}": jpeg(colour) for name, (wnid, colour) in TRAIN.items()})
    write(folder, {f"val/{wnid}/{name}": jpeg(colour) for name, (wnid, colour) in VAL.items()})
    return folder


def source(*arguments: str | Path) -> ImageNet:
    parser = argparse.ArgumentParser()
    ImageNet.add_arguments(parser)
    return ImageNet.from_arguments(parser.parse_args([*map(str, arguments), "--size", "8"]))


def content(collection: Collection) -> dict[str, list[tuple[list[int], int]]]:
    """(colour, label) of all images."""
    found = {}
    for name, split in collection.splits.items():
        loaded = [split.load(position) for position in range(len(split))]
        found[name] = [(image[0, 0].tolist(), label) for image, label in loaded]
    return found


def test_every_packing_gives_the_same(official: Path, unpacked: Path, tmp_path: Path) -> None:
    write(tmp_path / "tars", class_tars())
    write(tmp_path / "flat", {name: jpeg(colour) for name, (_, colour) in VAL.items()})
    write(tmp_path / "kit/ILSVRC2012_devkit_t12", devkit())
    lines = "".join(f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4\n" for name, (wnid, _) in VAL.items())
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + lines)
    (tmp_path / "val.txt").write_text("".join(f"val/{name} {wnid}\n" for name, (wnid, _) in VAL.items()))
    flat = ("--train", tmp_path / "tars", "--val", tmp_path / "flat", "--devkit")
    whole = content(source("--from", official).open(tmp_path))
    for arguments in (
        ("--from", unpacked),
        (*flat, tmp_path / "kit/ILSVRC2012_devkit_t12"),
        (*flat, tmp_path / "LOC_val_solution.csv"),
        (*flat, tmp_path / "val.txt"),
    ):
        assert content(source(*arguments).open(tmp_path)) == whole
    # Training photos come in an order of their names' hashes; classes are numbered by rank, not as the kit does.
    mixed = sorted(TRAIN, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert [label for _, label in whole["train"]] == [WNIDS.index(TRAIN[name][0]) for name in mixed]
    assert [label for _, label in whole["test"]] == [WNIDS.index(wnid) for wnid, _ in VAL.values()]
    wanted = [TRAIN[name][1] for name in mixed] + [colour for _, colour in VAL.values()]
    found = [colour for colour, _ in whole["train"] + whole["test"]]
    assert np.abs(np.array(found) - np.array(wanted)).max() <= 2  # JPEG


def test_prepared_from_the_archives(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["imagenet", "--from", str(official), "--size", "8", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--num-processes", "1"]) == 0
    train, test = (Manifest.load(tmp_path / "out" / name) for name in ("train", "test"))
    assert (train.num_samples, test.num_samples) == (9, 5)
    assert train.class_names == [f"{wnid} {WORDS[wnid]}" for wnid in WNIDS]
    assert train.source.origin == "ILSVRC2012_img_train.tar; test/ is the validation set, ILSVRC2012_img_val.tar"
    assert str(official) not in train.model_dump_json()  # no paths of this machine
    assert "warning: train has 9 photos of 3 classes, ImageNet has 1,281,167 of 1,000" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_options_follow_the_files_not_their_place(official: Path, unpacked: Path, tmp_path: Path) -> None:
    write(tmp_path / "moved", {path.name: path.read_bytes() for path in official.iterdir()})
    assert source("--from", tmp_path / "moved").options() == source("--from", official).options()
    before = source("--from", unpacked).options()
    assert before != source("--from", official).options()
    assert before != source("--from", unpacked, "--resize", "area").options()
    write(tmp_path / "grown", {"train/n01440764/n01440764_1.JPEG": b"", "val/n01440764/a.JPEG": b""})
    assert before["train"] != source("--from", tmp_path / "grown").options()["train"]


def test_photos_keep_their_exif_rotation_unapplied(tmp_path: Path) -> None:
    """As in all published work on ImageNet."""
    scene = np.zeros((8, 8, 3), dtype=np.uint8)
    scene[:4] = 255
    stored = Image.fromarray(scene)
    exif = stored.getexif()
    exif[0x0112] = 6
    for place in ("train", "val"):
        (tmp_path / place / "n01440764").mkdir(parents=True)
        stored.save(tmp_path / place / "n01440764/n01440764_1.JPEG", format="PNG", exif=exif)
    image, _ = source("--from", tmp_path).open(tmp_path).splits["train"].load(0)
    np.testing.assert_array_equal(image, scene)


@pytest.mark.parametrize("cut", [600, 5000, 20000])
def test_archive_that_was_cut_is_refused(official: Path, tmp_path: Path, cut: int) -> None:
    whole = (official / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[: -(len(whole) - cut) or None])
    with pytest.raises(DataError, match=r"train.tar.* is (cut short or damaged|no plain tar archive, or damaged)"):
        source("--from", official, "--train", tmp_path / "train.tar").open(tmp_path)


def test_cut_between_two_class_archives_is_noticed(official: Path, tmp_path: Path) -> None:
    """Nothing is torn, but the end mark is missing."""
    with tarfile.open(official / "ILSVRC2012_img_train.tar") as archive:
        end = archive.getmembers()[1].offset
    (tmp_path / "train.tar").write_bytes((official / "ILSVRC2012_img_train.tar").read_bytes()[:end])
    with pytest.raises(DataError, match=r"train.tar is cut short or damaged: it has no proper end"):
        source("--from", official, "--train", tmp_path / "train.tar").open(tmp_path)


def test_stray_files_in_the_validation_tar_are_passed_over(official: Path, tmp_path: Path) -> None:
    photos = {name: jpeg(colour) for name, (_, colour) in VAL.items()}
    stray = {"README.txt": b"hello", ".DS_Store": b"", "._ILSVRC2012_val_00000001.JPEG": b""}
    (tmp_path / "val.tar").write_bytes(tar(stray | photos))
    assert content(source("--from", official, "--val", tmp_path / "val.tar").open(tmp_path)) == content(
        source("--from", official).open(tmp_path)
    )


def test_labels_of_another_set_are_refused(official: Path, unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("".join(f"{name} n0999999{row}\n" for row, name in enumerate(VAL)))
    told = r"--val .* with --devkit .*other.txt: class n09999990 does not occur among the training photos.*\(5 such\)"
    with pytest.raises(DataError, match=told):
        source("--from", official, "--devkit", tmp_path / "other.txt").open(tmp_path)
    write(tmp_path / "val/n09999990", {"a.JPEG": b""})
    with pytest.raises(DataError, match=r"--val .*val: class n09999990 does not occur"):
        source("--from", unpacked, "--val", tmp_path / "val").open(tmp_path)


def test_what_is_missing_or_strange_is_named(official: Path, unpacked: Path, tmp_path: Path) -> None:
    def refused(told: str, *arguments: str | Path) -> None:
        with pytest.raises(DataError, match=told):
            source(*arguments).open(tmp_path)

    (tmp_path / "empty").mkdir()
    refused(
        r"--train is not given and --from .*empty holds none of ILSVRC2012_img_train.tar", "--from", tmp_path / "empty"
    )
    refused(r"--train is not given and there is no --from DIR")
    refused(r"--val .*absent: there is no such file", "--from", official, "--val", tmp_path / "absent")
    write(tmp_path / "flat", {"ILSVRC2012_val_00000009.JPEG": jpeg((0, 0, 0))})
    refused(r"tells no classes.*--devkit", "--from", unpacked, "--val", tmp_path / "flat")
    kit = ("--devkit", official / "ILSVRC2012_devkit_t12.tar.gz")
    refused(r"has no label for ILSVRC2012_val_00000009", "--from", unpacked, "--val", tmp_path / "flat", *kit)
    (tmp_path / "plain.tar").write_bytes(tar({"a.JPEG": jpeg((0, 0, 0))}))
    refused(r"plain.tar holds a.JPEG, expected class archives", "--from", official, "--train", tmp_path / "plain.tar")
    (tmp_path / "gzip.tar").write_bytes((official / "ILSVRC2012_devkit_t12.tar.gz").read_bytes())
    refused(r"gzip.tar is no plain tar archive.*gunzip", "--from", official, "--train", tmp_path / "gzip.tar")
    (tmp_path / "numbers.txt").write_text("a.JPEG 65\nb.JPEG 970\n")
    refused(r"numbers.txt, line 2: .*Class numbers differ", "--from", official, "--devkit", tmp_path / "numbers.txt")
    write(tmp_path / "half", {"meta.mat": meta()})
    refused(r"half holds no ILSVRC2012_validation_ground_truth", "--from", official, "--devkit", tmp_path / "half")
    write(tmp_path / "damaged", {**devkit(), "data/meta.mat": b"damaged"})
    refused(r"meta.mat is damaged", "--from", official, "--devkit", tmp_path / "damaged")
    write(tmp_path / "strange", {"cats/1.JPEG": jpeg((0, 0, 0))})
    refused(r"cats/1.JPEG lies in no class folder", "--from", unpacked, "--train", tmp_path / "strange")
