"""One's own images: classes, hold-out, resizing, and everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import main
from data_pipeline.resize import centre_crop, to_rgb


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
    assert train | test == {(10, n, 0) for n in range(10)} | {(200, n, 1) for n in range(10)}
    assert (len(train), len(test)) == (16, 4)
    manifest = Manifest.load(tmp_path / "out/train")
    assert (manifest.name, manifest.class_names) == ("animals", ["cat", "dog"])
    assert manifest.preprocessing == "box-bicubic-centre-crop"
    assert str(tmp_path) not in manifest.model_dump_json()  # no paths of this machine


def test_held_out_images_stay_held_out_when_others_come(classes: Path, tmp_path: Path) -> None:
    run(classes, tmp_path / "before", "--holdout", "0.2")
    plain((200, 0, 99)).save(classes / "dog/new.png")
    run(classes, tmp_path / "after", "--holdout", "0.2")
    assert len(colours(tmp_path / "before/test") & colours(tmp_path / "after/test")) >= 3


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
    assert [line.partition(":")[0] for line in listed] == ["cat/3.png", "cat/5.png"]
    data = ShardDataset(tmp_path / "out/train")
    assert len(data) == 18
    assert [int(key) for key in data.index.key] == [n for n in range(20) if n not in (3, 5)]


def test_nothing_to_prepare_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"empty holds no images \(files ending in .apng"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="there is no such folder"):
        run(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty/a.png").write_text("not an image")
    with pytest.raises(
        DataError, match=r"none of the 1 images of train can be read; the first: a.png: cannot identify"
    ):
        run(tmp_path / "empty", tmp_path / "out", "--holdout", "0")
    assert not (tmp_path / "out").exists()


def test_mixed_folder_and_bad_holdout_are_refused(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--holdout is 1.5"):
        run(classes, tmp_path / "out", "--holdout", "1.5")
    with pytest.raises(DataError, match=r"too few to hold out 0.99"):
        run(classes, tmp_path / "out", "--holdout", "0.99")
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


def test_kinds_of_files_become_rgb(tmp_path: Path) -> None:
    grey16 = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(grey16))[0, :, 0].tolist() == [0, 1, 255]
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(to_rgb(clear)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    upright = plain((1, 2, 3), 12, 10)
    exif = upright.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as turned:
        assert to_rgb(turned).size == (10, 12)
    for mode in ("1", "L", "P", "CMYK"):
        assert to_rgb(Image.new(mode, (3, 3))).mode == "RGB"
