"""Every kind of original is read on purpose: its pixels, or the reason why not."""

from __future__ import annotations

import io
import multiprocessing
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.resize import METHODS, centre_crop
from data_pipeline.sources.base import UnreadableImageError
from data_pipeline.sources.originals import LooseFiles, OriginalsSplit, enlargement_remarks, open_original
from data_pipeline.sources.sizing import Sizing

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth colours with some detail: what JPEG is made for."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    planes = [128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 60 + x + y]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png16(samples: NDArray[np.uint16], colour_type: int) -> bytes:
    """A 16-bit PNG, written by hand: samples [H, W, channels]."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(payload: bytes, *, upright: bool = True) -> NDArray[np.uint8]:
    return np.asarray(open_original(payload, upright=upright))


def load(tmp_path: Path, payload: bytes, size: int = 8, method: str = "improved-diffusion") -> NDArray[np.uint8]:
    (tmp_path / "a.img").write_bytes(payload)
    only = np.zeros(1, dtype=np.int64)
    return OriginalsSplit(LooseFiles(tmp_path, ["a.img"]), only, only, Sizing(size, method)).load(0)[0]


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_16_bit_png_keeps_its_high_bytes(colour_type: int, channels: int) -> None:
    levels = np.array([0, 255, 256, 257, 1000, 32768, 65535], dtype=np.uint16)
    samples = np.repeat(levels[None, :, None], channels, axis=2)
    expected = np.repeat((levels >> 8)[None, :, None], 3, axis=2)
    np.testing.assert_array_equal(pixels(png16(samples, colour_type)), expected)


def test_16_bit_png_with_alpha_is_laid_over_white() -> None:
    samples = np.array([[[65535, 0, 0, 65535], [65535, 0, 0, 0]]], dtype=np.uint16)
    assert pixels(png16(samples, 6)).tolist() == [[RED, WHITE]]


def test_transparency_is_laid_over_white() -> None:
    alpha = Image.new("RGBA", (3, 1), (0, 0, 255, 0))
    alpha.putpixel((1, 0), (0, 0, 255, 255))
    alpha.putpixel((2, 0), (0, 0, 255, 51))  # a fifth
    assert pixels(encoded(alpha, "PNG")).tolist() == [[WHITE, BLUE, [204, 204, 255]]]
    grey = Image.new("LA", (2, 1), (10, 255))
    grey.putpixel((1, 0), (10, 0))
    assert pixels(encoded(grey, "PNG")).tolist() == [[[10, 10, 10], WHITE]]
    keyed = Image.new("RGB", (2, 1), (255, 0, 0))
    keyed.putpixel((1, 0), (0, 255, 0))
    assert pixels(encoded(keyed, "PNG", transparency=(0, 255, 0))).tolist() == [[RED, WHITE]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_become_colours(kind: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    for x in range(3):
        image.putpixel((x, 0), x)
    assert pixels(encoded(image, kind)).tolist() == [[RED, GREEN, BLUE]]
    assert pixels(encoded(image, kind, transparency=1)).tolist() == [[RED, WHITE, BLUE]]


def test_bilevel_and_grey_become_rgb() -> None:
    assert pixels(encoded(Image.new("1", (1, 1), 1), "PNG")).tolist() == [[WHITE]]
    assert pixels(encoded(Image.new("L", (1, 1), 77), "BMP")).tolist() == [[[77, 77, 77]]]


def test_adobe_cmyk_jpeg_is_not_a_negative() -> None:
    payload = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)  # all magenta and yellow
    assert b"Adobe" in payload  # Pillow writes, as Photoshop does, inverted inks under Adobe's marker
    assert np.abs(pixels(payload).astype(int) - RED).max() <= 2


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), tuple(colour)) for colour in (RED, GREEN)]
    for kind in ("GIF", "WEBP", "PNG"):
        payload = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(io.BytesIO(payload)) as image:
            assert getattr(image, "n_frames") == 2  # noqa: B009  # not all of Pillow's images have it
        assert pixels(payload).tolist() == [[RED] * 4] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int) -> None:
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = RED, GREEN, BLUE
    # How a camera stores the scene for each value of the tag (EXIF 2.3: where row 0 and column 0 are in the scene).
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1],
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation]))
    exif = stored.getexif()
    exif[0x0112] = orientation
    payload = encoded(stored, "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(payload), upright)
    np.testing.assert_array_equal(pixels(payload, upright=False), turned[orientation])


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_tiff(orientation: int, compression: str | None) -> None:
    """Pillow turns these by itself while it loads them."""
    stored = photo((48, 32))
    exif = stored.getexif()
    exif[0x0112] = orientation
    payload = encoded(stored, "TIFF", exif=exif, compression=compression)
    np.testing.assert_array_equal(pixels(payload, upright=False), np.asarray(stored))
    np.testing.assert_array_equal(pixels(payload), pixels(encoded(stored, "PNG", exif=exif)))


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe rubbish", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff"])
@pytest.mark.filterwarnings("error")
def test_junk_in_exif_does_no_harm(junk: bytes) -> None:
    plain, with_junk = encoded(photo(), "JPEG"), encoded(photo(), "JPEG", exif=b"Exif\0\0" + junk)
    np.testing.assert_array_equal(pixels(with_junk), pixels(plain))


def test_name_does_not_matter(tmp_path: Path) -> None:
    photo().save(tmp_path / "n02105855_2933.JPEG", format="PNG")
    only = np.zeros(1, dtype=np.int64)
    split = OriginalsSplit(LooseFiles(tmp_path, ["n02105855_2933.JPEG"]), only, only, Sizing(48))
    np.testing.assert_array_equal(split.load(0)[0], np.asarray(photo().crop((8, 0, 56, 48))))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_truncated_jpeg_is_refused(tmp_path: Path, progressive: bool, share: float) -> None:
    whole = encoded(photo((256, 256)), "JPEG", quality=95, progressive=progressive)
    kept = int(share * len(whole))
    assert load(tmp_path, whole).shape == (8, 8, 3)
    for rest in (b"", bytes(len(whole) - kept)):  # cut, or a copy that broke off and left zeros
        with pytest.raises(UnreadableImageError, match=r"a.img: .*(truncated|no image file)"):
            load(tmp_path, whole[:kept] + rest)


def test_copy_that_broke_off_and_left_zeros_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG", quality=95)
    broken = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    with Image.open(io.BytesIO(broken)) as image:
        image.load()  # in dense pictures the zeros last to the end, and Pillow alone sees nothing
    with pytest.raises(UnreadableImageError, match=r"a.img: the file breaks off: its last part is zeros"):
        load(tmp_path, broken)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_jpeg_that_was_closed_again_is_no_half_grey_picture(tmp_path: Path, mode: str, share: float) -> None:
    whole = encoded(photo((250, 230)).convert(mode), "JPEG", quality=95)
    closed = whole[: int(share * len(whole))] + b"\xff\xd9"
    with Image.open(io.BytesIO(closed)) as image:  # Pillow alone sees nothing
        assert np.asarray(image.convert("RGB"))[-1, -1].tolist() == [128, 128, 128]
    with pytest.raises(UnreadableImageError, match=r"a.img: the file was cut and closed again"):
        load(tmp_path, closed)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("size", [(64, 48), (61, 47), (16, 16), (9, 200)])
def test_grey_corner_alone_is_no_damage(quality: int, subsampling: int, size: tuple[int, int]) -> None:
    for image in (photo(size), Image.new("RGB", size, (128, 128, 128))):
        image.paste((128, 128, 128), (size[0] // 2, size[1] // 2, *size))
        payload = encoded(image, "JPEG", quality=quality, subsampling=subsampling)
        assert pixels(payload).shape == (size[1], size[0], 3)


def test_complete_jpeg_with_a_tail_is_read(tmp_path: Path) -> None:
    whole = encoded(photo(), "JPEG")
    np.testing.assert_array_equal(load(tmp_path, whole + bytes(500)), load(tmp_path, whole))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_other_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    whole = encoded(photo(), kind)
    with pytest.raises(UnreadableImageError, match=r"a.img: .+"):
        load(tmp_path, whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "a.img: the file is empty"),
        (b"<html>not found</html>", r"a.img: no image file of a known kind \(22 bytes\)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a.img: "),
        (encoded(photo(), "JPEG")[:3] + bytes(400), "a.img: "),
        (encoded(photo(), "EPS"), "no image file of a known kind"),  # Pillow would start another program
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point samples have no known range"),
        (encoded(Image.new("I", (4, 4), 70000), "TIFF"), "samples of 70000 to 70000 are beyond 16 bits"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path, payload: bytes, told: str) -> None:
    with pytest.raises(UnreadableImageError, match=told):
        load(tmp_path, payload)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    bomb = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = struct.pack(">II", 20_000, 20_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(UnreadableImageError, match=r"400000000 pixels.*exceeds limit"):
        load(tmp_path, bytes(bomb))


def test_narrow_original_is_refused_before_it_is_blown_up(tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (2, 60_000)), "PNG")  # 256 pixels wide, it would be 7.7 million high
    with pytest.raises(UnreadableImageError, match=r"a.img: too narrow: at 256x7680000 pixels"):
        load(tmp_path, bomb, 256)
    assert load(tmp_path, encoded(Image.new("L", (20, 600)), "PNG"), 256).shape == (256, 256, 3)


def test_area_methods_are_means(tmp_path: Path) -> None:
    fine = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    original = Image.fromarray(fine)
    squeezed = fine.reshape(8, 4, 8, 8, 3).mean(axis=(1, 3))
    cropped = fine[:, 16:48].reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    # Pillow averages columns, then rows, and rounds after each: at most 0.5 + 0.5 off.
    assert np.abs(METHODS["area"].resize(original, 8) - squeezed).max() <= 1.0
    assert np.abs(METHODS["area-centre-crop"].resize(original, 8) - cropped).max() <= 1.0


def test_no_resizing_refuses_other_sizes(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"a.img: it is 64x48, expected 48x48 \(--resize none\)"):
        load(tmp_path, encoded(photo(), "PNG"), 48, "none")
    right = photo((48, 48))
    np.testing.assert_array_equal(load(tmp_path, encoded(right, "PNG"), 48, "none"), np.asarray(right))


def test_enlarged_originals_are_counted_over_all_processes(tmp_path: Path) -> None:
    for number, size in enumerate([(64, 48), (64, 20), (20, 64), (48, 64), (8, 8)]):
        photo(size).save(tmp_path / f"{number}.png")
    rows = np.arange(5)
    split = OriginalsSplit(LooseFiles(tmp_path, [f"{n}.png" for n in range(5)]), rows, rows, Sizing(48))
    assert enlargement_remarks({"train": split}, 48) == []
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=lambda p=part: [split.load(n) for n in p]) for part in ([0, 1], [2, 3, 4])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    told = enlargement_remarks({"train": split}, 48)
    assert told == ["train: 3 of the originals that were read are smaller than 48 pixels: enlarged"]
    assert centre_crop(photo((8, 8)), 48).shape == (48, 48, 3)
