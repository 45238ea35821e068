"""How images are stored: lossless, readable by others, and damage never passes for an image."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import codec, npy, png
from data_pipeline.codec import Encoding


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image: NDArray[np.uint8], kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def batch(payloads: list[bytes], height: int, width: int) -> NDArray[np.uint8]:
    """Images [n, 3, H, W] of our own PNGs, decoded together."""
    rows = png.empty_rows(len(payloads), height, width)
    assert all(png.inflate(payload, rows[:, row]) for row, payload in enumerate(payloads))
    images = np.empty((len(payloads), 3, height, width), np.uint8)
    png.unfilter(rows, images)
    return images


@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99), smooth=st.booleans())
@settings(max_examples=40, deadline=None)
def test_both_encodings_are_lossless_and_others_read_them(height: int, width: int, seed: int, smooth: bool) -> None:
    image = noise(height, width, seed) // (64 if smooth else 1)
    stored = codec.encode(image, "png")
    with Image.open(io.BytesIO(stored)) as other:
        np.testing.assert_array_equal(np.asarray(other), image)
    np.testing.assert_array_equal(batch([stored], height, width)[0], image.transpose(2, 0, 1))
    stored = codec.encode(image, "npy")
    np.testing.assert_array_equal(np.load(io.BytesIO(stored)), image.transpose(2, 0, 1))
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(image.transpose(2, 0, 1)))
    assert buffer.getvalue() == stored


@pytest.mark.parametrize("encoding", ["png", "npy"])
def test_equal_pixels_give_equal_bytes(encoding: Encoding) -> None:
    image = noise(16, 16)
    assert codec.encode(image, encoding) == codec.encode(np.asfortranarray(image), encoding)


def test_images_of_a_batch_do_not_mix() -> None:
    images = [noise(8, 8, seed) for seed in range(70)]
    np.testing.assert_array_equal(batch([png.encode(x) for x in images], 8, 8), np.stack(images).transpose(0, 3, 1, 2))


def test_pngs_of_other_writers_are_left_to_pillow() -> None:
    image = noise(8, 8)
    rows = png.empty_rows(1, 8, 8)
    assert not png.inflate(by_pillow(image // 64, "PNG"), rows[:, 0])
    assert not png.inflate(png.encode(noise(8, 9)), rows[:, 0])
    assert not png.inflate(by_pillow(image, "PNG", "L"), rows[:, 0])


def test_damage_in_our_own_png_is_found() -> None:
    stored = png.encode(noise(8, 8) // 64)
    rows, intact = png.empty_rows(2, 8, 8).transpose(1, 0, 2)
    assert png.inflate(stored, intact)
    found = 0
    for at in range(41, len(stored) - 16):  # every byte of the compressed rows
        broken = bytearray(stored)
        broken[at] ^= 0x10
        try:
            png.inflate(bytes(broken), rows)
        except ValueError:
            found += 1
        else:
            np.testing.assert_array_equal(rows, intact)  # a bit without meaning
    assert found > len(stored) - 60


@pytest.mark.parametrize("rows", [7, 9])
def test_a_png_with_too_few_or_too_many_rows_is_refused(rows: int) -> None:
    stored = bytearray(png.encode(noise(8, 8)))
    data = zlib.compress(bytes(rows * 25))
    forged = bytes(stored[:33]) + len(data).to_bytes(4, "big") + b"IDAT" + data + bytes(4) + bytes(stored[-12:])
    with pytest.raises(ValueError, match=f"{rows * 25} bytes instead of 200"):
        png.inflate(forged, png.empty_rows(1, 8, 8)[:, 0])


@pytest.mark.parametrize("keep", [0, 20, 50, 100])
@pytest.mark.parametrize("encoding", ["png", "npy", "any"])
def test_cut_off_images_are_refused(encoding: Encoding, keep: int) -> None:
    stored = codec.encode(noise(8, 8), "npy" if encoding == "npy" else "png")
    with pytest.raises((ValueError, OSError, SyntaxError, EOFError)):
        codec.decode(stored[:keep], encoding)


def test_what_others_stored_is_recognised() -> None:
    image = noise(8, 8)
    hwc = io.BytesIO()
    np.save(hwc, image)
    cases = [
        (codec.encode(image, "png"), "png"), (by_pillow(image, "PNG"), "png"), (codec.encode(image, "npy"), "npy"),
        (hwc.getvalue(), "any"), (by_pillow(image, "WEBP"), "any"), (by_pillow(image, "JPEG"), "any"),
        (by_pillow(image, "PNG", "RGBA"), "any"),
    ]  # fmt: skip
    for stored, encoding in cases:
        found, recognised = codec.recognise(stored)
        assert recognised == encoding
        assert found.shape == image.shape
        if not stored.startswith((b"\xff\xd8", b"RIFF")):  # the lossless ones
            np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 8, 8), np.float32), ((8, 8), np.uint8), ((4, 8, 8), np.uint8)])
def test_arrays_that_are_no_images_are_refused(shape: tuple[int, ...], dtype: type) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, dtype))
    with pytest.raises(ValueError, match="expected uint8"):
        codec.decode(buffer.getvalue(), "any")


def test_arrays_of_objects_are_not_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        codec.decode(buffer.getvalue(), "npy")


def test_the_header_of_raw_images_is_numpys() -> None:
    assert len(npy.header(3, 64, 64)) % 64 == 0
    assert np.load(io.BytesIO(npy.header(3, 2, 2) + bytes(12))).shape == (3, 2, 2)
