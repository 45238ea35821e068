"""`python -m evaluation.progressive`: what was predicted on the way to the very samples that `sample` makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_data import exact_denoiser
from PIL import Image
from random_stage import make_export, make_stage

from data_pipeline.errors import ConfigError, UserError
from evaluation.progressive import Progressive, main
from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.progressive import Recorder, evenly
from trainer.diffusion.samplers import SAMPLERS
from trainer.sample_noise import SampleNoise
from trainer.sampling import Stage, sample


@pytest.fixture(scope="module")
def stage(tiny_config: Path) -> Stage:
    return make_stage(tiny_config, respacing="20")


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["progressive", *map(str, arguments)])
        assert main() == 0


def test_evenly_spaced_steps_have_both_ends() -> None:
    assert evenly(100, 5) == (99, 74, 50, 25, 0)
    assert evenly(7, 1) == (6,)
    assert evenly(2, 2) == (1, 0)


def test_recording_changes_no_sample_and_ends_in_it() -> None:
    config = DiffusionConfig(num_timesteps=50, variance="fixed_small", objective="simple", rescale_timesteps=False)
    process = GaussianDiffusion.create(config)
    recorder = Recorder(exact_denoiser(config), process, threshold=None, steps=frozenset({49, 20, 0}))
    plain = Recorder(exact_denoiser(config), process, threshold=None)
    for name in ("ancestral", "ddim"):
        found, expected = (
            SAMPLERS[name](p, (noise := SampleNoise(range(3), (3, 4, 4)))(), noise=noise) for p in (recorder, plain)
        )
        assert torch.equal(found, expected)
        assert set(recorder.x) == set(recorder.x0) == {49, 20, 0}
        torch.testing.assert_close(recorder.x0[0], found)  # at the last step the prediction is the sample
        assert not plain.x


def test_predictions_lead_to_the_samples_of_the_same_numbers(stage: Stage) -> None:
    progressive = Progressive(stage, torch.device("cpu"), columns=4, seed=3)
    predictions = progressive.predictions(range(5, 8))
    assert predictions.shape == (3, 4, 16, 16, 3)
    assert progressive.times == sorted(progressive.times, reverse=True)
    assert (progressive.times[0], progressive.times[-1]) == (99, 0)
    samples = sample(stage, range(5, 8), seed=3).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(predictions[:, -1], samples)


def test_images_share_more_the_later_they_part(stage: Stage) -> None:
    images, times = Progressive(stage, torch.device("cpu"), columns=4, seed=0).sharing(0, 6)
    assert images.shape == (len(times), 6, 16, 16, 3)
    assert times == sorted(times)
    spread = images.astype(float).std(axis=1).mean(axis=(1, 2, 3))
    assert spread[0] < spread[-1]
    assert spread[0] > 0


def test_the_command_writes_its_pictures(stage: Stage, generated_data: Path, tmp_path: Path) -> None:
    export, out = make_export(tmp_path / "export", stage), tmp_path / "out"
    run(export, "--num", 4, "--columns", 3, "--share", 2, "--data", generated_data / "test", "--out", out,
        "--num-threads", 1, "--respacing", 10)  # fmt: skip
    for name in ("x0", "shared", "quality"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 100
    found = json.loads((out / "quality.json").read_text())
    assert [point["t"] for point in found["points"]] == [99, 44, 0]  # every eleventh step
    assert all(point["fd_efflite0"] > 0 for point in found["points"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--num", 0], UserError, "--num 0"),
        (["--columns", 1], UserError, "--columns 1"),
        (["--respacing", 1000], ConfigError, "1000"),
        (["--guidance", 2], UserError, "null class"),
        (["--eta", 0.5], ConfigError, "eta"),
        (["--share", 3, "--sampler", "ddim", "--respacing", 5], UserError, "--share: sampler=ddim"),
    ],
)
def test_what_cannot_be_is_refused(
    stage: Stage, tmp_path: Path, arguments: list[object], error: type[Exception], message: str
) -> None:
    export = make_export(tmp_path / "export", stage)
    with pytest.raises(error, match=message):
        run(export, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_upsampler_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", make_stage(tiny_config, "model.low_res_size=8"))
    with pytest.raises(UserError, match="base network"):
        run(export, "--out", tmp_path / "out")
