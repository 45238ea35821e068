"""One's own images: classes, hold-out, resizing, and everything that can be wrong with them."""

from __future__ import annotations

import argparse
import hashlib
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import main
from data_pipeline.resize import centre_crop
from data_pipeline.sources import archives
from data_pipeline.sources.holdout import held_out
from data_pipeline.sources.image_folder import ImageFolder


def plain(colour: tuple[int, int, int], width: int = 12, height: int = 10) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two class folders, ten images each; blue levels number them."""
    folder = tmp_path / "animals"
    for name, red in (("dog", 200), ("cat", 10)):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            plain((red, 0, number)).save(folder / name / f"{number}.png")
    return folder


def run(folder: Path, out: Path, *options: str) -> None:
    assert main(["folder", "--from", str(folder), "--out", str(out), "--size", "8", *options]) == 0


def colours(out: Path) -> set[tuple[int, ...]]:
    """(red, blue, label) of all images."""
    data = ShardDataset(out)
    images, labels = data.read(np.arange(len(data)))
    return {(int(x[0, 0, 0]), int(x[2, 0, 0]), y) for x, y in zip(images, labels.tolist(), strict=True)}


def test_class_folders_become_labels(classes: Path, tmp_path: Path) -> None:
    run(classes, tmp_path / "out", "--holdout", "0.2")
    train, test = colours(tmp_path / "out/train"), colours(tmp_path / "out/test")
    rows = [(name, red, label, n) for label, (name, red) in enumerate([("cat", 10), ("dog", 200)]) for n in range(10)]
    images = {f"{name}/{n}.png": (red, n, label) for name, red, label, n in rows}
    held = {colour for name, colour in images.items() if hashlib.sha256(name.encode()).hexdigest() < "3333333333333333"}
    assert 2 <= len(held) <= 8
    assert (train, test) == (set(images.values()) - held, held)
    manifest = Manifest.load(tmp_path / "out/train")
    assert (manifest.name, manifest.class_names) == ("animals", ["cat", "dog"])
    assert manifest.preprocessing == "box-bicubic-centre-crop"
    assert str(tmp_path) not in manifest.model_dump_json()  # no paths of this machine


def test_split_of_an_image_does_not_depend_on_the_others() -> None:
    names = [f"cat/{number}.png" for number in range(1000)]
    chosen = held_out(names, 0.1, origin="--from x")
    assert 70 <= chosen.sum() <= 130
    more = held_out([f"dog/{number}.png" for number in range(500)] + names, 0.1, origin="--from x")
    fewer = held_out(names[::2], 0.1, origin="--from x")
    np.testing.assert_array_equal(more[500:], chosen)
    np.testing.assert_array_equal(fewer, chosen[::2])


def test_changed_folder_is_noticed(classes: Path, tmp_path: Path) -> None:
    run(classes, tmp_path / "out")
    run(classes, tmp_path / "out")  # nothing to do
    plain((1, 2, 3)).save(classes / "dog/new.png")
    with pytest.raises(DataError, match="already holds other data"):
        run(classes, tmp_path / "out")


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(4):
        plain((number, 0, 0)).save(tmp_path / "flat" / f"{number}.JPG", quality=100)
    run(tmp_path / "flat", tmp_path / "out", "--holdout", "0")
    assert {label for _, _, label in colours(tmp_path / "out/train")} == {-1}
    assert Manifest.load(tmp_path / "out/train").num_classes == 0
    assert not (tmp_path / "out/test").exists()


def test_unreadable_images_are_listed_and_keys_stay(classes: Path, tmp_path: Path) -> None:
    whole = (classes / "cat/3.png").read_bytes()
    (classes / "cat/3.png").write_bytes(whole[:-30])
    (classes / "cat/5.png").write_text("not an image")
    run(classes, tmp_path / "out", "--holdout", "0")
    listed = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert {line.partition(":")[0] for line in listed} == {"cat/3.png", "cat/5.png"}
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(10)]
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    data = ShardDataset(tmp_path / "out/train")
    assert len(data) == 18
    assert [order[int(key)] for key in data.index.key] == [n for n in order if n not in ("cat/3.png", "cat/5.png")]


def test_nothing_to_prepare_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"empty holds no images \(files ending in .apng"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="there is no such folder"):
        run(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty/a.png").write_text("not an image")
    with pytest.raises(
        DataError, match=r"none of the 1 images of train can be read; the first: a.png: no image file of a known kind"
    ):
        run(tmp_path / "empty", tmp_path / "out", "--holdout", "0")
    assert not (tmp_path / "out").exists()


def test_mixed_folder_and_bad_holdout_are_refused(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--holdout is 1.5"):
        run(classes, tmp_path / "out", "--holdout", "1.5")
    for share, number in (("0.9999", 20), ("0.0001", 0)):
        with pytest.raises(DataError, match=rf"--holdout {share} holds out {number} of 20 images.*too few for that"):
            run(classes, tmp_path / "out", "--holdout", share)
    plain((0, 0, 0)).save(classes / "stray.png")
    with pytest.raises(DataError, match=r"mixes images in class folders with 1 images beside them \(such as stray.png"):
        run(classes, tmp_path / "out")


@pytest.mark.parametrize("width", [5, 16, 17, 31, 33, 100, 101])
@pytest.mark.parametrize("height", [7, 16, 40, 64])
def test_any_shape_gives_the_size(width: int, height: int) -> None:
    assert centre_crop(plain((50, 60, 70), width, height), 16).shape == (16, 16, 3)


def test_crop_is_central_and_halving_averages() -> None:
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    np.testing.assert_array_equal(centre_crop(Image.fromarray(wide), 16), wide[:, 16:32])
    fine: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    means = fine.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    # Pillow averages columns, then rows, and rounds after each: at most 0.5 + 0.5 off.
    assert np.abs(centre_crop(Image.fromarray(fine), 16) - means).max() <= 1.0


def pack(folder: Path, archive: Path) -> None:
    """The folder's files in an archive of the kind that its name says; in a zip, below one folder, most compressed."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), reverse=True)
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w") as tar:
            for path in files:
                tar.add(path, f"./{path.relative_to(folder)}")
        return
    with zipfile.ZipFile(archive, "w") as packed:
        for number, path in enumerate(files):
            packed.write(path, path.relative_to(folder.parent), zipfile.ZIP_DEFLATED if number else zipfile.ZIP_STORED)


def all_images(folder: Path, *options: str) -> list[tuple[str, list[tuple[list[int], int]]]]:
    parser = argparse.ArgumentParser()
    ImageFolder.add_arguments(parser)
    arguments = parser.parse_args(["--from", str(folder), "--size", "8", *options])
    splits = ImageFolder.from_arguments(arguments).open(folder).splits
    return [
        (name, [(image[0, 0].tolist(), label) for image, label in map(split.load, range(len(split)))])
        for name, split in splits.items()
    ]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_give_what_their_folder_gives(classes: Path, tmp_path: Path, kind: str) -> None:
    (classes / ".hidden").mkdir()
    (classes / ".hidden/a.png").write_text("not an image")
    (classes / "notes.txt").write_text("not an image")
    archive = tmp_path / f"animals.{kind}"
    pack(classes, archive)
    assert all_images(archive) == all_images(classes)
    assert all_images(archive, "--labels", "none") == all_images(classes, "--labels", "none")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"animals.{kind} is (cut short|damaged|no plain tar archive, or damaged)"):
        all_images(archive)


def test_archive_of_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    """Such as the unlabelled 64-pixel ImageNet of van den Oord et al. 2016, train_64x64.tar."""
    (tmp_path / "train_64x64").mkdir()
    for number in range(3):
        plain((number, 0, 0), 8, 8).save(tmp_path / f"train_64x64/{number}.png")
    with tarfile.open(tmp_path / "train_64x64.tar", "w") as tar:
        tar.add(tmp_path / "train_64x64", "train_64x64")
    [(_, images)] = all_images(tmp_path / "train_64x64.tar", "--holdout", "0", "--resize", "none")
    assert images == [([number, 0, 0], -1) for number in range(3)]


def test_archive_with_one_class_is_as_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in/cat").mkdir(parents=True)
    for number in range(3):
        plain((number, 0, 0)).save(tmp_path / f"in/cat/{number}.png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as packed:
        for path in (tmp_path / "in/cat").iterdir():
            packed.write(path, f"cat/{path.name}")
    alone = ("--holdout", "0")
    assert all_images(tmp_path / "photos.zip", *alone) == all_images(tmp_path / "in", *alone)
    assert {label for _, images in all_images(tmp_path / "photos.zip", *alone) for _, label in images} == {0}


@pytest.mark.parametrize("place", ["/home/me/animals/", "../../", "./animals/../"])
def test_names_that_lead_out_of_an_archive_stay_within(classes: Path, tmp_path: Path, place: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in classes.glob("*/*.png"):
            entry = tar.gettarinfo(str(path))
            entry.name = f"{place}{path.parent.name}/{path.name}"  # as tar -P stores it
            with path.open("rb") as content:
                tar.addfile(entry, content)
    assert all_images(tmp_path / "x.tar") == all_images(classes)


def test_member_that_inflates_without_bound_is_unreadable(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MAX_INFLATED", 100_000)
    (classes / "cat/bomb.png").write_bytes(bytes(1_000_000))
    pack(classes, tmp_path / "x.zip")
    run(tmp_path / "x.zip", tmp_path / "out")
    listed = (tmp_path / "out/unreadable.txt").read_text()
    assert listed.startswith("cat/bomb.png: it is cut short, or inflates to more than 100,000 bytes")


def test_links_are_followed_but_not_in_circles(classes: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "dog").mkdir(parents=True)
    (linked / "cat").symlink_to(classes / "cat")
    for path in (classes / "dog").iterdir():
        (linked / "dog" / path.name).symlink_to(path)
    for place, target in (("dog/up", ".."), ("dog/self", "."), ("loop", "loop.d"), ("loop.d", "loop")):
        (linked / place).symlink_to(target)
    with pytest.raises(DataError, match=r"loop(.d)? cannot be read \(Too many levels of symbolic links\)"):
        all_images(linked)
    (linked / "loop.d").unlink()
    with pytest.raises(DataError, match="loop is a link that leads nowhere and may be a class"):
        all_images(linked)
    (linked / "loop").unlink()
    assert all_images(linked) == all_images(classes)
    for name in ("cat", "dog"):  # all of them
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / name).symlink_to(classes / name)
    assert all_images(tmp_path / "all") == all_images(classes)


def test_pipes_are_no_images_and_dangling_links_unreadable(classes: Path, tmp_path: Path) -> None:
    os.mkfifo(classes / "cat/pipe.png")
    (classes / "cat/pipe_too.png").symlink_to("pipe.png")
    (classes / "cat/gone.png").symlink_to("absent.png")
    run(classes, tmp_path / "out")
    assert (tmp_path / "out/unreadable.txt").read_text() == "cat/gone.png: it is a link that leads nowhere\n"


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for name in ("caf\udce9", "dog"):  # a Latin-1 letter
        (tmp_path / "d_\udce9" / name).mkdir(parents=True)
        for number in range(10):
            plain((1, 2, number)).save(tmp_path / "d_\udce9" / name / f"{number}.png")
    (tmp_path / "d_\udce9/dog/\udce9.png").write_text("not an image")
    run(tmp_path / "d_\udce9", tmp_path / "out", "--holdout", "0.5")
    manifest = Manifest.load(tmp_path / "out/train")
    assert (manifest.name, manifest.class_names) == (r"d_\xe9", [r"caf\xe9", "dog"])
    assert (tmp_path / "out/unreadable.txt").read_text().startswith(r"dog/\xe9.png: no image file")


def test_labels_by_prefix(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    for name, red in (("deep/truck_1.png", 200), ("deep/er/cat_7_b.png", 10), ("truck_22.png", 201)):
        plain((red, 0, 0)).save(tmp_path / name)
    [(_, images)] = all_images(tmp_path, "--labels", "prefix", "--holdout", "0")
    assert sorted((colour[0], label) for colour, label in images) == [(10, 0), (200, 1), (201, 1)]
    plain((0, 0, 0)).save(tmp_path / "nameless.png")
    with pytest.raises(DataError, match=r'nameless.png has no "_"'):
        all_images(tmp_path, "--labels", "prefix")
    with pytest.raises(DataError, match="mixes images in class folders"):
        all_images(tmp_path, "--labels", "folder")
    assert {label for _, images in all_images(tmp_path, "--labels", "none") for _, label in images} == {-1}


def test_own_test_folder(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "held/dog").mkdir(parents=True)
    plain((5, 6, 7)).save(tmp_path / "held/dog/1.png")
    splits = dict(all_images(classes, "--test", str(tmp_path / "held")))
    assert len(splits["train"]) == 20
    assert splits["test"] == [([5, 6, 7], 1)]
    (tmp_path / "held/dog").rename(tmp_path / "held/wolf")
    with pytest.raises(DataError, match="class wolf does not occur among the training images"):
        all_images(classes, "--test", str(tmp_path / "held"))
    with pytest.raises(DataError, match="give one of the two"):
        all_images(classes, "--test", str(tmp_path / "held"), "--holdout", "0.1")
    (tmp_path / "held/wolf/1.png").rename(tmp_path / "held/1.png")
    with pytest.raises(DataError, match="has no class folders, the training images have them"):
        all_images(classes, "--test", str(tmp_path / "held"))


def test_classes_are_mixed_over_the_shards(tmp_path: Path) -> None:
    """One class after the other would leave the shuffle of the stream with few of them at a time."""
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(40):
            plain((1, 2, 3), 8, 8).save(tmp_path / "in" / name / f"{number}.png")
    [(_, images)] = all_images(tmp_path / "in", "--holdout", "0")
    assert 10 <= sum(label for _, label in images[:40]) <= 30


def test_resize_method_is_recorded(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(classes, tmp_path / "out", "--resize", "area")
    assert Manifest.load(tmp_path / "out/train").preprocessing == "area-squeeze"
    with pytest.raises(DataError, match=r"already holds other data: .*'resize': 'area'"):
        run(classes, tmp_path / "out")
