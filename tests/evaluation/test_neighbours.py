"""Nearest training images: against all distances written out, and what they say of copies."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation import neighbours
from evaluation.features import Features
from evaluation.neighbours import main, memorisation, nearest, neighbour_figure


@dataclass(frozen=True)
class Projection:
    """A feature net: fixed random directions of an image, which a mirrored one does not share."""

    name: str = "projection"
    dim: int = 7
    spatial_dim: int = 0
    num_classes: int = 0
    weights_sha256: str = "0" * 64
    resize: int = 16

    def __call__(self, images: Tensor) -> Features:
        directions = torch.randn(images[0].numel(), self.dim, generator=torch.Generator().manual_seed(0))
        return Features(images.flatten(1).float() @ directions)


@pytest.fixture(scope="module")
def train(generated_data: Path) -> ShardDataset:
    return ShardDataset(generated_data / "train")


@pytest.fixture(scope="module")
def queries(generated_data: Path) -> Tensor:
    return torch.from_numpy(ShardDataset(generated_data / "test").read(np.arange(9))[0])


def written_out(queries: Tensor, images: Tensor, net: Projection | None) -> np.ndarray:
    """All distances [k, n], of a query or its mirror image, whichever is nearer."""

    def vector(image: Tensor) -> np.ndarray:
        return (image.flatten() if net is None else net(image[None]).pool[0]).numpy().astype(np.float64)

    return np.array(
        [
            [min(np.linalg.norm(vector(q) - vector(x)) for q in (query, query.flip(-1))) for x in images]
            for query in queries
        ]
    )


@pytest.mark.parametrize("net", [None, Projection()])
@pytest.mark.parametrize("block", [50, 512])
def test_nearest_are_those_of_all_distances(
    train: ShardDataset, queries: Tensor, net: Projection | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    images = torch.from_numpy(train.read(np.arange(len(train)))[0])
    expected = written_out(queries, images, net)
    found = nearest(queries, train, net=net, num=4)
    assert found.index.tolist() == np.argsort(expected, axis=1, kind="stable")[:, :4].tolist()
    # Pixels: whole numbers, exact. The net's float32 product rounds by its batch.
    rtol = 1e-15 if net is None else 1e-5
    np.testing.assert_allclose(found.distance, np.sort(expected, axis=1)[:, :4], rtol=rtol)


@pytest.mark.parametrize("net", [None, Projection()])
def test_copies_and_mirrored_copies_are_found(train: ShardDataset, queries: Tensor, net: Projection | None) -> None:
    images = torch.from_numpy(train.read(np.array([200, 3]))[0])
    copies = torch.stack([images[0], images[1].flip(-1)])
    found = nearest(copies, train, net=net, num=2)
    assert found.index[:, 0].tolist() == [200, 3]
    assert found.distance[:, 0] == pytest.approx([0, 0], abs=0 if net is None else 0.1)
    flagged = memorisation(found, nearest(queries[:2], train, net=net, num=1), space="pixels")
    assert flagged.ratio < 0.01
    assert flagged.nearest_sample < 0.1 < flagged.nearest_held_out


def test_equally_near_images_come_in_order(
    train: ShardDataset, queries: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 3)
    monkeypatch.setattr(neighbours, "_vectors", lambda images, net: np.zeros((len(images), 2)))
    assert nearest(queries, train, num=5).index.tolist() == [[0, 1, 2, 3, 4]] * len(queries)


def test_few_images_are_in_memory(train: ShardDataset, queries: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = ShardDataset.read, []

    def watched(self: ShardDataset, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(indices))
        return read(self, indices)

    monkeypatch.setattr(neighbours, "BLOCK", 60)
    monkeypatch.setattr(ShardDataset, "read", watched)
    nearest(queries, train, num=1)
    assert sizes == [60, 60, 60, 60, 16]


def test_the_figure_shows_what_was_found(train: ShardDataset, queries: Tensor, tmp_path: Path) -> None:
    found = nearest(queries[:2], train, num=3)
    neighbour_figure(queries[:2], train, found, tmp_path / "near.png")
    pixels = np.asarray(Image.open(tmp_path / "near.png").convert("RGB"))
    seen = {tuple(colour) for colour in pixels.reshape(-1, 3)}
    shown = np.concatenate([queries[:2].numpy(), train.read(found.index.ravel())[0]])  # [8, 3, H, W]
    for image in shown:
        corners = {tuple(image[:, y, x]) for y in (3, 9) for x in (3, 12)}
        assert corners <= seen


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["neighbours", *map(str, arguments)])
        assert main() == 0


def test_the_command(generated_data: Path, queries: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = generated_data / "train", generated_data / "test"
    np.savez(tmp_path / "a.npz", queries[:3].permute(0, 2, 3, 1).numpy())
    out = tmp_path / "near.png"
    run(tmp_path / "a.npz", "--data", train, "--held-out", test, "--num-samples", 3, "--num", 2, "--out", out, "--json")
    report = json.loads(capsys.readouterr().out)["spaces"]["pixels"]
    expected = nearest(queries[:3], ShardDataset(train), num=2)
    assert (report["index"], report["distance"]) == (expected.index.tolist(), expected.distance.tolist())
    assert 0.3 < report["memorisation"]["ratio"] < 3  # held-out images too
    assert out.exists()
    run(test, "--data", train, "--num-samples", 1, "--num", 1, "--out", out)  # a folder of shards
    run(tmp_path / "a.npz", "--data", train, "--num-samples", 1, "--num", 1)
    assert (tmp_path / "a-neighbours.png").exists()
    assert "pixels: median distance" in capsys.readouterr().out
    for arguments, message in (
        ((tmp_path / "a.npz", "--num-samples", 4), "--num-samples 4: .* has 3 images"),
        ((tmp_path / "a.npz", "--num", 0), "--num 0 is too small"),
        ((tmp_path / "a.npz", "--num", 1000, "--num-samples", 1), "1000 neighbours are asked for"),
        ((tmp_path / "none.npz",), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments, "--data", train, "--out", out)
    np.savez(tmp_path / "b.npz", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"the samples are 8x8, .* 16x16"):
        run(tmp_path / "b.npz", "--data", train, "--num-samples", 1, "--out", out)
    with pytest.raises(UserError, match=r"must end in \.png"):
        run(tmp_path / "a.npz", "--data", train, "--out", tmp_path / "near.gif")
