"""Samplers on Gaussian data with its exact denoiser, and the noise that is a sample's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_data import MEAN, SPREAD, exact_denoiser, sampled_moments
from random_stage import make_stage
from ranks import run_ranks
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.cascade import check_cascade, sample_cascade
from trainer.config.diffusion import DiffusionConfig
from trainer.config.run import load_config
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS, to_uint8
from trainer.sample_noise import SampleNoise
from trainer.sampling import Stage, sample

FIXED = DiffusionConfig(num_timesteps=200, variance="fixed_small", objective="simple", rescale_timesteps=False)


@pytest.mark.parametrize("respacing", ["20", "200", "5,10,20", "ddim50", "quadratic30"])
@pytest.mark.parametrize(("name", "eta"), [("ancestral", None), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)])
def test_samplers_reach_the_moments_of_gaussian_data(name: str, eta: float | None, respacing: str) -> None:
    process = GaussianDiffusion.create(FIXED, "cpu", respacing)
    noise = SampleNoise(range(64), (3, 16, 16))
    options = {} if eta is None else {"eta": eta}
    samples = SAMPLERS[name](Predictor(exact_denoiser(FIXED), process, None), noise(), noise=noise, **options)
    mean, std = sampled_moments(process, eta)
    error = std / math.sqrt(samples.numel())
    assert float(samples.mean()) == pytest.approx(mean, abs=4 * error)
    assert float(samples.std()) == pytest.approx(std, abs=4 * error)


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_expected_moments_approach_the_data_with_more_steps(eta: float | None) -> None:
    """So that the test above compares with the truth and not only with itself."""
    errors = []
    for steps in (100, 1000, 4000):
        config = DiffusionConfig(num_timesteps=steps, variance="fixed_small", objective="simple")
        mean, std = sampled_moments(GaussianDiffusion.create(config), eta)
        errors.append(abs(std - SPREAD) + abs(mean - MEAN))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.002


def double_samples(config: DiffusionConfig, name: str, respacing: str, **options: float) -> Tensor:
    """Four samples of the perfect network in float64, from the same x_T and noise whatever the config."""
    noise = SampleNoise(range(4), (3, 4, 4))
    process = GaussianDiffusion.create(config, "cpu", respacing)
    predictor = Predictor(exact_denoiser(config), process, threshold=None)
    return SAMPLERS[name](predictor, noise().double(), noise=noise, **options)


@pytest.mark.parametrize("respacing", ["200", "20", "ddim50", "quadratic30"])
@pytest.mark.parametrize("name", ["ancestral", "ddim"])
@pytest.mark.parametrize("kind", ["x0", "v", "previous_mean"])
def test_samplers_read_every_parameterisation(kind: Any, name: str, respacing: str) -> None:
    """A network trained on all steps leads to the same images whatever it predicts, on any respacing."""
    expected = double_samples(FIXED, name, respacing)
    found = double_samples(FIXED.model_copy(update={"prediction": kind}), name, respacing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("respacing", ["200", "20", "ddim50", "quadratic30"])
def test_learned_variances_mean_the_same_on_any_respacing(respacing: str) -> None:
    learned = DiffusionConfig(num_timesteps=200, variance="learned", rescale_timesteps=False)
    in_range = learned.model_copy(update={"variance": "learned_range"})
    found, expected = (double_samples(config, "ancestral", respacing) for config in (learned, in_range))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_ddim_with_eta_one_is_ancestral_with_the_small_variance() -> None:
    ancestral_images = double_samples(FIXED, "ancestral", "25")
    torch.testing.assert_close(ancestral_images, double_samples(FIXED, "ddim", "25", eta=1.0), rtol=0, atol=1e-6)


def test_deterministic_ddim_draws_nothing() -> None:
    process = GaussianDiffusion.create(FIXED, "cpu", "10")

    def nothing() -> Tensor:
        raise AssertionError("noise was drawn")

    SAMPLERS["ddim"](Predictor(exact_denoiser(FIXED), process), torch.zeros(2, 3, 4, 4), noise=nothing)


# ---- noise ------------------------------------------------------------------------------------------------------


def test_a_samples_noise_is_its_seeds_alone() -> None:
    alone, together = SampleNoise([5], (3, 4, 4)), SampleNoise([9, 3, 5, 1, 0], (3, 4, 4))
    for _ in range(4):
        assert torch.equal(alone()[0], together()[2])


def test_noise_is_new_at_every_call_seed_and_stage() -> None:
    noise = SampleNoise([0], (3, 8, 8))
    other_seed, other_stage = SampleNoise([0], (3, 8, 8), seed=1), SampleNoise([0], (3, 8, 8), stage=1)
    drawn = torch.stack([noise(), noise(), noise(), other_seed(), other_stage()]).flatten(1)
    assert (torch.corrcoef(drawn) - torch.eye(5)).abs().max() < 0.3  # 192 numbers: 4 standard errors


def test_background_draws_are_never_overwritten() -> None:
    """What a call returned stays as it is while later ones are drawn."""
    noise = SampleNoise(range(8), (3, 4, 4))
    kept = [noise() for _ in range(6)]
    again = SampleNoise(range(8), (3, 4, 4))
    for tensor in kept:
        assert torch.equal(tensor, again())


# ---- networks ---------------------------------------------------------------------------------------------------


# Stated in docs/diffusion.md: how far a sample's pixels may move, in grey levels, with the batch it is made in.
# Convolutions and attention round differently for other batch sizes; nothing else may differ.
TOLERANCE = 1


@pytest.mark.parametrize(
    "how",
    [{"sampler": "ancestral"}, {"sampler": "ddim"}, {"sampler": "heun"},
     {"sampler": "dpmpp_2s", "threshold": "dynamic", "threshold_quantile": 0.9},
     {"sampler": "dpmpp_2m_sde", "corrector_steps": 1, "corrector_snr": 0.16}],
    ids=lambda how: how["sampler"],
)  # fmt: skip
def test_samples_do_not_depend_on_their_batch(tiny_config: Path, how: dict[str, Any]) -> None:
    stage = make_stage(tiny_config)
    stage = Stage(stage.network, stage.config, SamplingConfig(respacing="logsnr25", **how))
    together = sample(stage, range(8))
    assert together.shape == (8, 3, 16, 16)
    for part in ([0], [1, 2, 3], [7, 5]):
        difference = (sample(stage, part).int() - together[part].int()).abs()
        assert difference.max() <= TOLERANCE
        assert (difference > 0).float().mean() < 0.01
    assert (sample(stage, range(8), seed=1) != together).float().mean() > 0.5


def test_samples_do_not_depend_on_the_number_of_processes(tiny_config: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent / "sample_scenario.py"
    for world_size in (1, 2):
        run_ranks([str(script), str(tiny_config), str(tmp_path / str(world_size))], world_size)
    whole = torch.load(tmp_path / "1-0.pt")
    halves = torch.cat([torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)])
    assert (whole.int() - halves.int()).abs().max() <= TOLERANCE
    assert whole.float().std() > 10


def test_classes_reach_the_samples(tiny_config: Path) -> None:
    stage = make_stage(tiny_config, "model.num_classes=4", "model.null_class=true")
    chosen = sample(stage, [0, 0, 0], labels=[2, 3, -1])
    assert (chosen[0] != chosen[1]).any()
    assert (chosen[0] != chosen[2]).any()
    assert torch.equal(sample(stage, [1, 2]), sample(stage, [1, 2], labels=[1, 2]))  # the default: i modulo 4
    with pytest.raises(UserError, match="class 4 is unknown"):
        sample(stage, [0], labels=[4])


def test_cascade_enlarges_what_the_stage_before_made(tiny_config: Path) -> None:
    base = make_stage(tiny_config, "model.image_size=8", "model.attention_resolutions=[4]")
    upsampler = make_stage(tiny_config, "model.low_res_size=8", "name=upsampler")
    small, large = sample_cascade([base, upsampler], range(4))
    assert (small.shape, large.shape) == ((4, 3, 8, 8), (4, 3, 16, 16))
    assert torch.equal(small, sample(base, range(4)))
    alone = sample(upsampler, range(4), low_res=small.float() / 127.5 - 1, stage_number=1)
    assert torch.equal(large, alone)
    assert (large != sample(upsampler, range(4), low_res=torch.zeros(4, 3, 8, 8), stage_number=1)).any()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_cascades_and_guided_networks_take_any_sampler(tiny_config: Path, sampler: Any) -> None:
    """And every network call is told of: two where it is guided."""
    classes = ("model.num_classes=4", "model.null_class=true")
    base = make_stage(tiny_config, "model.image_size=8", "model.attention_resolutions=[4]", *classes, sampler=sampler)
    upsampler = make_stage(tiny_config, "model.low_res_size=8", "name=upsampler", *classes, sampler=sampler)
    guided = [
        Stage(stage.network, stage.config, stage.sampling.model_copy(update={"guidance": 2.0}))
        for stage in (base, upsampler)
    ]
    calls: list[int] = []
    small, large = sample_cascade(guided, range(2), progress=lambda: calls.append(1))
    assert len(calls) == sum(stage.num_calls for stage in guided) == 2 * (base.num_calls + upsampler.num_calls)
    assert base.num_calls == (8 if sampler == "heun" else 5)
    plain = sample_cascade([base, upsampler], range(2))
    assert (small != plain[0]).any()
    assert (large != plain[1]).any()


@pytest.mark.parametrize("low_res", [0, 4])
def test_stages_that_do_not_fit_are_refused(tiny_config: Path, low_res: int) -> None:
    first = load_config(tiny_config, ["model.image_size=8", "model.attention_resolutions=[4]"])
    second = load_config(tiny_config, [f"model.low_res_size={low_res}", "name=second"])
    with pytest.raises(UserError, match=r"stage 2 \(second\).*8 px"):
        check_cascade([first, second])
    with pytest.raises(UserError, match="stage 1"):
        check_cascade([load_config(tiny_config, ["model.low_res_size=8"])])


def test_uint8_rounds_to_the_nearest_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    exact = levels.float() / 127.5 - 1
    assert torch.equal(to_uint8(exact), levels)
    assert torch.equal(to_uint8(exact + 0.003), levels)
    assert to_uint8(torch.tensor([-1.7, 1.7])).tolist() == [0, 255]
