"""The manifest refuses what is missing, damaged or inconsistent, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.fingerprint import fingerprint, sample_digest
from data_pipeline.manifest import Manifest


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_saved_manifest_loads_equal(prepared: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(prepared / "train")
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (manifest.num_samples, manifest.image_size, manifest.num_classes) == (203, 8, 3)


def test_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*absent.*python -m data_pipeline.prepare cifar10 --out"):
        Manifest.load(tmp_path / "absent" / "train")
    with pytest.raises(DataError, match=r"holds no manifest.json"):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match=r"smaller.*prepare webdataset --from SPLIT .*--size SIZE --out .*absent_8$"):
        Manifest.load(tmp_path / "absent_8" / "train")


def test_folder_of_splits_names_them(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"use .*generated/test or .*generated/train"):
        Manifest.load(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 204}, "num_samples is 204, but the shards hold 203"),
        ({"num_samples": "203"}, "num_samples: Input should be a valid integer"),
        ({"num_classes": 2}, "num_classes is 2, but 3 classes are named"),
        ({"fingerprint": "abc"}, "fingerprint: String should match"),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"format": "image-shards/7"}, "format is 'image-shards/7', this version reads 'image-shards/1'"),
    ],
)
def test_invalid_manifest_is_refused(own_copy: Path, changes: dict[str, Any], message: str) -> None:
    edit(own_copy / "train", **changes)
    with pytest.raises(DataError, match=message):
        Manifest.load(own_copy / "train")


def test_shard_outside_the_folder_is_refused(own_copy: Path) -> None:
    shards = json.loads((own_copy / "train/manifest.json").read_text())["shards"]
    shards[0]["file"] = "../elsewhere.tar"
    edit(own_copy / "train", shards=shards)
    with pytest.raises(DataError, match=r"shards\.0\.file"):
        Manifest.load(own_copy / "train")


def test_half_a_manifest_is_refused(own_copy: Path) -> None:
    path = own_copy / "train/manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"not a valid manifest.*Remove .*copy and make it anew"):
        Manifest.load(own_copy / "train")


def test_fingerprint_tells_pixels_labels_order_and_shape_apart() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    other = image.copy()
    other[1, 2, 0] ^= 1
    digests = [
        sample_digest(x, label) for x, label in ((image, 0), (other, 0), (image, 1), (image.reshape(4, 2, 3), 0))
    ]
    assert len(set(digests)) == 4
    assert fingerprint(digests) != fingerprint(digests[::-1])
    # Part of the format: stored results are compared by it.
    assert digests[0].hex() == "a697be9438ced2f0bffdfbb08261a298fa62544f901728a5d3f8bfd35a42a60b"
