"""Sets of images at a path: npz, shards, folders; and every way in which they are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_net import some_images

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from evaluation.image_sets import ImageSet, NpzImages, batches, holds_images, holds_statistics, open_images


def pixels(images: ImageSet) -> list[np.ndarray]:
    return list(images.read(np.arange(len(images))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_images_is_read_in_slices(tmp_path: Path, save: object) -> None:
    assert callable(save)
    expected = some_images(30)
    save(tmp_path / "samples.npz", expected, np.arange(30))  # with classes, as ADM has it
    images = open_images(tmp_path / "samples.npz")
    assert len(images) == 30
    assert np.array_equal(pixels(images), expected)
    assert np.array_equal(list(images.read(np.array([0, 3, 4, 29]))), expected[[0, 3, 4, 29]])
    found = [batch.permute(0, 2, 3, 1).numpy() for batch in batches(images, np.arange(30), 8)]
    assert [len(batch) for batch in found] == [8, 8, 8, 6]
    assert np.array_equal(np.concatenate(found), expected)


def test_shards_are_the_data_split(generated_data: Path) -> None:
    images, dataset = open_images(generated_data / "test"), ShardDataset(generated_data / "test")
    expected, _ = dataset.read(np.arange(len(dataset)))
    assert np.array_equal(pixels(images), expected.transpose(0, 2, 3, 1))
    assert images.fingerprint == dataset.manifest.fingerprint


def test_a_folder_of_images_of_any_depth_size_and_mode(tmp_path: Path) -> None:
    a, b = some_images(2, size=6)
    large = some_images(1, size=9)[0]
    (tmp_path / "cats").mkdir()
    Image.fromarray(b).save(tmp_path / "cats" / "2.PNG")
    Image.fromarray(a).save(tmp_path / "cats" / "1.webp", lossless=True)
    Image.fromarray(large).save(tmp_path / "dog.bmp")
    Image.fromarray(large[..., 0]).save(tmp_path / "grey.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(tmp_path)
    found = pixels(images)
    assert len(found) == 4
    for read, expected in zip(found, (a, b, large, np.repeat(large[..., :1], 3, axis=2)), strict=True):
        assert np.array_equal(read, expected)
    assert [tuple(batch.shape) for batch in batches(images, np.arange(4))] == [(2, 3, 6, 6), (2, 3, 9, 9)]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2, :, 3] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    (found,) = pixels(open_images(tmp_path))
    assert (found[:2] == 0).all()
    assert (found[2:] == 255).all()


def test_fingerprint_is_of_the_pixels_in_any_file(tmp_path: Path) -> None:
    expected = some_images(5)
    np.savez(tmp_path / "a.npz", expected)
    np.savez_compressed(tmp_path / "b.npz", expected)
    (tmp_path / "c").mkdir()
    for number, image in enumerate(expected):
        Image.fromarray(image).save(tmp_path / "c" / f"{number}.png")
    found = {open_images(tmp_path / name).fingerprint for name in ("a.npz", "b.npz", "c")}
    assert len(found) == 1
    changed = expected.copy()
    changed[3, 0, 0, 0] ^= 1
    np.savez(tmp_path / "d.npz", changed)
    assert open_images(tmp_path / "d.npz").fingerprint not in found


def test_what_an_npz_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", some_images(2), mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "images.npz", some_images(2))
    assert (holds_statistics(tmp_path / "adm.npz"), holds_images(tmp_path / "adm.npz")) == (True, True)
    assert (holds_statistics(tmp_path / "images.npz"), holds_images(tmp_path / "images.npz")) == (False, True)
    assert not holds_statistics(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"arr_0 is float32 \[4, 8, 8, 3\].*Scale floats to 0..255"),
        (np.zeros((4, 8, 8), np.uint8), r"arr_0 is uint8 \[4, 8, 8\].*Repeat the channel of grey images"),
        (np.zeros((4, 8, 8, 1), np.uint8), "Repeat the channel of grey images"),
        (np.zeros((4, 8, 8, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((4, 3, 8, 8), np.uint8), "Move the channels to the end"),
        (np.zeros((4, 8, 8, 5), np.uint8), r"images are uint8 \[N, H, W, 3\]\.$"),
        (np.zeros((4, 8, 8, 3), np.int64), r"arr_0 is int64 .*images are uint8 \[N, H, W, 3\]\.$"),
        (np.zeros((4,), np.uint8), r"images are uint8 \[N, H, W, 3\]\.$"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
        (np.asfortranarray(some_images(4)), "Fortran order"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "bad.npz", array)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "bad.npz")


def test_paths_that_are_no_images(tmp_path: Path, generated_data: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*gone"):
        open_images(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no images .*and no manifest.json"):
        open_images(tmp_path)
    with pytest.raises(DataError, match=r"holds the data splits test, train: name one, such as .*test"):
        open_images(generated_data)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt is not a readable npz"):
        open_images(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt is not a readable npz"):
        holds_statistics(tmp_path / "a.txt")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(DataError, match=r"neither images \(arr_0\) nor feature statistics \(mu, sigma\), but weights"):
        open_images(tmp_path / "other.npz")


def test_damage_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", some_images(40))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[5000] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is not a readable npz file \(Bad CRC"):
        pixels(NpzImages(tmp_path / "a.npz"))
    Image.fromarray(some_images(1)[0]).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"torn\.png cannot be read as an image \(.*\): mend or remove it"):
        pixels(open_images(tmp_path))
