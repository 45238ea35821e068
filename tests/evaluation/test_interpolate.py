"""`python -m evaluation.interpolate`: from one real image to another, and back to either."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_data import CLASSIFIER
from PIL import Image
from random_stage import make_export, make_stage
from torch import Tensor, nn

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import ConfigError, UserError
from evaluation.interpolate import Ends, Interpolation, main, read_depths, read_ends
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.interpolation import slerp
from trainer.sampling import Stage

CPU = torch.device("cpu")


class Shrinking(nn.Module):
    """The best guess of eps for pixels that are N(0, 1): sigma * x_t. On it the probability flow stands still."""

    def __init__(self, diffusion_sigma: Tensor) -> None:
        super().__init__()
        self.sigma = diffusion_sigma

    def forward(self, x: Tensor, time: Tensor, *_: Tensor | None) -> Tensor:
        eps = self.sigma[(time / 10).round().long()].view(-1, 1, 1, 1) * x
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)


@pytest.fixture(scope="module")
def stage(tiny_config: Path) -> Stage:
    return make_stage(tiny_config, respacing="20")


@pytest.fixture(scope="module")
def ends(generated_data: Path) -> Ends:
    return read_ends(ShardDataset(generated_data / "test"), "3,8", CPU)


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["interpolate", *map(str, arguments)])
        assert main() == 0


def pixels(images: Tensor) -> np.ndarray:
    found: np.ndarray = (images.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5).round().astype(np.uint8)
    return found


def test_inverted_images_come_back_and_the_arc_leads_from_one_to_the_other(stage: Stage, ends: Ends) -> None:
    """With the exact network of white noise, whose flow is the identity: rows are known in closed form."""
    schedule = GaussianDiffusion.create(stage.config.diffusion).schedule
    network = Shrinking(schedule.sqrt_one_minus_alphas_cumprod.float())
    exact = Stage(network, stage.config, SamplingConfig(sampler="ddim", respacing="100"))
    row = Interpolation(exact, CPU, columns=5, encoder="ddim", seed=0).row(ends, 0.9)
    expected = pixels(slerp(*ends.images, torch.linspace(0, 1, 5)).clamp(-1, 1))
    assert np.abs(row.astype(int) - expected.astype(int)).max() <= 6  # 90 steps of Euler's method, of 256 levels
    assert np.abs(row[0].astype(int) - pixels(ends.images)[0].astype(int)).mean() < 3


def test_little_noise_leaves_the_ends_as_they_are(stage: Stage, ends: Ends) -> None:
    network = nn.Module()
    network.forward = lambda x, time, *_: torch.zeros(len(x), 6, *x.shape[2:])  # type: ignore[method-assign]
    still = Stage(network, stage.config, SamplingConfig(sampler="ddim", respacing="100"))
    row = Interpolation(still, CPU, columns=3, encoder="noise", seed=0).row(ends, 0.01)
    real = pixels(ends.images).astype(float)
    assert np.abs(row[0] - real[0]).mean() < 8
    assert np.abs(row[2] - real[1]).mean() < 8
    assert np.abs(row[1] - real.mean(axis=0)).mean() < 8


def test_a_row_is_a_function_of_its_seed_and_pair(stage: Stage, ends: Ends) -> None:
    first, again, other = (
        Interpolation(stage, CPU, columns=4, encoder="noise", seed=seed).row(ends, 0.5) for seed in (1, 1, 2)
    )
    assert first.shape == (4, 16, 16, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_classifier_is_asked_for_the_class_of_the_nearer_image(
    tiny_config: Path, generated_data: Path, tmp_path: Path
) -> None:
    """Also where the network itself knows none."""
    classifier = make_export(tmp_path / "classifier", make_stage(tiny_config, *CLASSIFIER))
    sampling = SamplingConfig(respacing="5", classifier=classifier, classifier_scale=100)
    bare = make_stage(tiny_config)
    stage = Stage.open(bare.network, bare.config, sampling)
    images = read_ends(ShardDataset(generated_data / "test"), "3,8", CPU).images
    rows = [
        Interpolation(stage, CPU, columns=4, encoder="noise", seed=0).row(Ends((3, 8), images, labels), 0.5)
        for labels in ((0, 0), (0, 1))
    ]
    assert np.array_equal(rows[0][:2], rows[1][:2])
    assert not np.array_equal(rows[0][2:], rows[1][2:])


def test_the_nearer_image_gives_the_class() -> None:
    ends = Ends((0, 1), torch.zeros(2, 3, 4, 4), (7, 2))
    assert ends.nearer(torch.tensor([0.0, 0.4, 0.6, 1.0])) == [7, 7, 2, 2]


@pytest.mark.parametrize("encoder", ["noise", "ddim"])
def test_the_command_writes_picture_and_images(
    tiny_config: Path, generated_data: Path, tmp_path: Path, encoder: str
) -> None:
    stage = make_stage(tiny_config, "model.num_classes=4")
    export, out = make_export(tmp_path / "export", stage), tmp_path / "out" / "between.png"
    run(export, "--data", generated_data / "test", "--pairs", "3,8", "0,1", "--columns", 3, "--depths", "0.2,0.5",
        "--encoder", encoder, "--out", out, "--num-threads", 1, "--respacing", 10)  # fmt: skip
    with Image.open(out) as picture:
        assert min(picture.size) > 300
    with np.load(out.with_suffix(".npz")) as file:
        images = file["arr_0"]
    assert images.shape == (4 * 5, 16, 16, 3)
    real = ShardDataset(generated_data / "test").read(np.array([3, 8]))[0]
    assert np.array_equal(images[0], real[0].transpose(1, 2, 0))
    assert np.array_equal(images[4], real[1].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--columns", 1], UserError, "--columns 1"),
        (["--pairs", "3"], UserError, "--pairs 3"),
        (["--pairs", "3,64"], UserError, "0 to 63"),
        (["--depths", "0"], UserError, "--depths 0"),
        (["--out", "picture.jpg"], UserError, "png"),
        (["--encoder", "ddim", "--sampler", "ancestral"], UserError, "sampler"),
        (["--encoder", "ddim", "--eta", 0.5], UserError, "eta"),
        (["--encoder", "ddim", "--threshold", "none"], UserError, "threshold"),
        (["--encoder", "ddim", "--corrector-steps", 1, "--corrector-snr", 0.1], UserError, "corrector"),
        (["--respacing", 1000], ConfigError, "1000"),
    ],
)
def test_what_cannot_be_is_refused(
    stage: Stage, generated_data: Path, tmp_path: Path, arguments: list[object], error: type[Exception], message: str
) -> None:
    export = make_export(tmp_path / "export", stage)
    with pytest.raises(error, match=message):
        run(export, "--data", generated_data / "test", "--out", tmp_path / "out.png", *arguments)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("text", ["", "x", "0.5,", "1.5", "nan"])
def test_depths_that_are_no_shares_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--depths"):
        read_depths(text)
