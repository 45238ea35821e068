"""Cascades with noise between their stages: what they make of Gaussian data, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_cascade import MEAN, covariance, perfect_stage, sampled_covariance
from random_stage import make_stage
from torch import Tensor

from data_pipeline.counter_rng import Stream
from data_pipeline.errors import ConfigError, UserError
from trainer.cascade import check_augmentation, sample_cascade, step_reached, stops, total_calls
from trainer.config.run import load_config
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.low_res_noise import LowResNoise
from trainer.diffusion.samplers import to_uint8
from trainer.sample_noise import SampleNoise
from trainer.sampling import Stage, draw, predictor_of, run_sampler, sample

SMALL = ("model.image_size=4", "model.attention_resolutions=[]", "model.channel_mult=[1]", "name=small")
MIDDLE = ("model.image_size=8", "model.low_res_size=4", "model.attention_resolutions=[]", "name=middle")
LARGE = ("model.image_size=16", "model.low_res_size=8", "name=large")
NOISY = "model.low_res_noise.max_step=60"
KINDS = ["non_truncated", "truncated"]


def with_noise(stage: Stage, step: int, kind: Any = "non_truncated") -> Stage:
    update = {"low_res_noise": step, "augmentation": kind if step else "non_truncated"}
    return Stage(stage.network, stage.config, stage.sampling.model_copy(update=update))


def three_stages(path: Path, *steps: int, kind: Any = "non_truncated", respacing: str = "5") -> list[Stage]:
    stages = [make_stage(path, *SMALL, respacing=respacing)]
    for settings, step in zip((MIDDLE, LARGE), steps, strict=True):
        stages.append(with_noise(make_stage(path, *settings, NOISY, respacing=respacing), step, kind))
    return stages


# ---- Gaussian data: what comes out is known -------------------------------------------------------------------------


def perfect_stages(path: Path, *steps: int, kind: str, respacing: str) -> list[Stage]:
    """4 px, then to 8, then to 16; `steps` are the noise on what the last two enlarge."""
    sampling = SamplingConfig(sampler="ddim", respacing=respacing)
    stages = [perfect_stage(path, 4, 0, sampling)]
    for size, step in zip((8, 16), steps, strict=True):
        stages.append(with_noise(perfect_stage(path, size, size // 2, sampling, max_step=800), step, kind))
    return stages


def sampled_pixels(stages: list[Stage], num: int) -> Tensor:
    """Of the last stage's images, channel by channel, less their mean: [3 num, pixels] float64."""
    images = sample_cascade(stages, range(num))[-1]
    return (images.double() / 127.5 - 1).flatten(2).flatten(0, 1) - MEAN


@pytest.mark.parametrize("kind", KINDS)
def test_three_stages_make_the_covariance_that_they_must(tiny_config: Path, kind: str) -> None:
    stages = perfect_stages(tiny_config, 600, 400, kind=kind, respacing="40")
    expected, found = sampled_covariance(stages), sampled_pixels(stages, 400)
    num = len(found)
    covered = found.T @ found / num
    # What the covariance of so many true samples is off by: its trace, and all of it (Frobenius norm).
    trace_error = math.sqrt(2 * float((expected @ expected).trace()) / num)
    error = math.sqrt(float(expected.trace() ** 2 + (expected @ expected).trace()) / num)
    assert abs(float(covered.trace() - expected.trace())) < 4 * trace_error
    assert float((covered - expected).norm()) < 1.1 * error
    assert float(found.mean().abs()) < 4 * math.sqrt(float(expected.mean()) / num)
    # So many samples tell a cascade apart in which one stage is told of less noise than there is.
    wrong = [*stages[:2], with_noise(stages[2], 400, kind)]
    network = wrong[2].network
    wrong[2].network.forward = lambda x, time, labels, low_res, s: type(network).forward(  # type: ignore[method-assign]
        network,
        x,
        time,
        labels,
        low_res,
        s / 2,  # type: ignore[arg-type]
    )
    misled = sampled_pixels(wrong, 400)
    assert abs(float((misled.T @ misled / num).trace() - expected.trace())) > 6 * trace_error


@pytest.mark.parametrize("kind", KINDS)
def test_what_they_must_make_is_the_datas(tiny_config: Path, kind: str) -> None:
    """Closed form; with 100 steps DDIM has lost three per cent of the covariance, see the longer test."""
    made, datas = sampled_covariance(perfect_stages(tiny_config, 600, 400, kind=kind, respacing="100")), covariance(16)
    assert float((made - datas).norm() / datas.norm()) < 0.04


@pytest.mark.prove
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [(300, 200), (600, 500), (300, 0)])
def test_with_all_steps_they_make_the_datas(tiny_config: Path, kind: str, steps: tuple[int, int]) -> None:
    datas = covariance(16)
    errors = []
    for respacing in ("100", "1000"):
        made = sampled_covariance(perfect_stages(tiny_config, *steps, kind=kind, respacing=respacing))
        errors.append(float((made - datas).norm() / datas.norm()))
    assert errors[1] < (0.004 if all(steps) else 0.008)  # without noise the last stage has more to sharpen
    assert errors[1] < errors[0] / 5  # what is left is DDIM's, of first order


# ---- which images go from stage to stage ----------------------------------------------------------------------------


def told(stages: list[Stage]) -> list[tuple[Tensor, Tensor]]:
    """What each network after the first is told at its first call: low_res and low_res_time."""
    found = []
    for stage in stages[1:]:
        stage.network.register_forward_pre_hook(lambda _, args: found.append(args[3:5]) and None)
    sample_cascade(stages, range(2))
    return [found[0], found[len(found) // 2]]


def test_finished_images_are_noised_with_noise_of_their_own(tiny_config: Path) -> None:
    stages = three_stages(tiny_config, 40, 0)
    (noisy, time), (plain, zero) = told(stages)
    small = sample(stages[0], range(2))
    noise = SampleNoise(range(2), (3, 4, 4), stage=1, stream=Stream.SAMPLE_LOW_RES)()
    process = stages[1].config.low_res_process
    assert process is not None
    steps = torch.tensor([40, 40])
    assert torch.equal(noisy, LowResNoise.create(process).add(small.float() / 127.5 - 1, steps, noise))
    assert time.tolist() == [400.0, 400.0]  # rescaled, as t is: T is 100
    assert zero.tolist() == [0.0, 0.0]
    assert torch.equal(to_uint8(plain).float() / 127.5 - 1, plain)  # images of 8 bits


def test_a_truncated_stage_gives_what_its_sampler_had_at_that_step(tiny_config: Path) -> None:
    stages = three_stages(tiny_config, 40, 30, kind="truncated", respacing="20")
    (first, first_time), (second, second_time) = told(stages)
    seen: list[Tensor] = []
    predictor = predictor_of(stages[0], range(2))
    asked = predictor.__class__(lambda x, time: (seen.append(x), predictor.denoiser(x, time))[1], predictor.diffusion)
    noise = SampleNoise(range(2), (3, 4, 4))
    run_sampler(stages[0].sampling, asked, noise(), noise)
    visited = predictor.diffusion.schedule.timestep_map.tolist()
    reached = min(step for step in visited if step >= 40)
    assert torch.equal(first, seen[19 - visited.index(reached)])
    assert first_time.tolist() == [10.0 * reached] * 2
    assert second_time.tolist() == [10.0 * min(step for step in visited if step >= 30)] * 2
    assert (to_uint8(second).float() / 127.5 - 1 != second).any()  # not rounded
    images = sample_cascade(stages, range(2))
    assert torch.equal(images[0], to_uint8(first))  # a truncated stage's images are its z_s
    assert torch.equal(images[1], to_uint8(second))


def test_calls_are_counted_honestly(tiny_config: Path) -> None:
    calls: list[int] = []
    for kind, steps, expected in (("non_truncated", (40, 30), 60), ("truncated", (40, 30), 20 - 8 + 20 - 6 + 20)):
        stages = three_stages(tiny_config, *steps, kind=kind, respacing="20")
        calls.clear()
        sample_cascade(stages, range(1), progress=lambda: calls.append(1))
        assert len(calls) == total_calls(stages)
        assert abs(len(calls) - expected) <= 2  # steps lie 100 / 19 apart


def test_a_network_is_told_s(tiny_config: Path) -> None:
    stage = make_stage(tiny_config, *MIDDLE, NOISY)
    x, time, low_res = torch.randn(2, 3, 8, 8), torch.tensor([30.0, 70.0]), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        outputs = [stage.network(x, time, None, low_res, torch.full((2,), s)) for s in (0.0, 100.0, 600.0)]
    assert (outputs[0] != outputs[1]).any()
    assert (outputs[1] != outputs[2]).any()


def test_noise_is_each_samples_own(tiny_config: Path) -> None:
    """Whoever else is in the batch, and whatever s is chosen: x_T stays."""
    stage = with_noise(make_stage(tiny_config, *MIDDLE, NOISY), 50)
    low_res = torch.rand(3, 3, 4, 4) * 2 - 1
    together = sample(stage, [4, 5, 6], low_res=low_res, stage_number=1)
    alone = torch.cat([sample(stage, [n], low_res=low_res[n - 4 : n - 3], stage_number=1) for n in (4, 5, 6)])
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together != sample(with_noise(stage, 20), [4, 5, 6], low_res=low_res, stage_number=1)).any()
    started: list[Tensor] = []
    for step in (0, 50):
        hook = stage.network.register_forward_pre_hook(lambda _, args: started.append(args[0]) and None)
        sample(with_noise(stage, step), [4], low_res=low_res[:1], stage_number=1)
        hook.remove()
    assert torch.equal(started[0], started[len(started) // 2])


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(stages: list[Stage], *, has_base: bool = False) -> str:
    with pytest.raises(UserError) as error:
        check_augmentation([s.config for s in stages], [s.sampling for s in stages], has_base=has_base)
    return str(error.value)


def test_noise_that_a_network_was_not_trained_with_is_refused(tiny_config: Path) -> None:
    stages = three_stages(tiny_config, 60, 61)
    assert "stage 3: low_res_noise=61" in refused(stages)
    assert "steps up to 60" in refused(stages)
    untold = [stages[0], with_noise(make_stage(tiny_config, *MIDDLE), 5)]
    assert "stage 2: low_res_noise=5: middle was trained without noise" in refused(untold)
    with pytest.raises(UserError, match="low_res_noise=5"):
        sample(untold[1], [0], low_res=torch.zeros(1, 3, 4, 4))
    with pytest.raises(UserError, match="stage 3"):
        sample_cascade(stages, range(1))


def test_truncation_needs_a_stage_of_the_same_process_below(tiny_config: Path) -> None:
    stages = three_stages(tiny_config, 40, 30, kind="truncated", respacing="20")
    assert stops([s.sampling for s in stages]) == [40, 30, 0]
    check_augmentation([s.config for s in stages], [s.sampling for s in stages])
    assert "images given as base are finished" in refused(stages[1:], has_base=True)
    assert "there is none" in refused(stages[1:])
    other = make_stage(tiny_config, *SMALL, "diffusion.schedule=linear", respacing="20")
    assert "small has the process 100 linear" in refused([other, *stages[1:]])
    # The upper stage may be trained for noise of such a process, whatever its own is.
    settings = ("model.low_res_noise.schedule=linear", "model.low_res_noise.num_timesteps=100")
    middle = with_noise(make_stage(tiny_config, *MIDDLE, NOISY, *settings), 40, "truncated")
    check_augmentation([s.config for s in (other, middle)], [s.sampling for s in (other, middle)])


def test_truncation_reaches_a_step_that_is_visited(tiny_config: Path) -> None:
    coarse = three_stages(tiny_config, 60, 0, kind="truncated", respacing="3")  # visits 0, 50 and 99
    assert step_reached(coarse[0].config.diffusion, coarse[0].sampling, 40) == 50
    assert "visits from there on is 99" in refused(coarse)
    stages = three_stages(tiny_config, 60, 0, kind="truncated", respacing="ddim2")  # visits 0 and 50
    assert "stage 2 (middle): low_res_noise=60: stop=60" in refused(stages)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.low_res_noise.max_step=50"], ["model.low_res_noise", "model.low_res_size=0"]),
        (["model.low_res_size=8", "model.low_res_noise.max_step=100"], ["max_step=100", "99"]),
        (["model.low_res_size=8", "model.low_res_noise.max_step=0"], ["model.low_res_noise.max_step=0"]),
        (["model.low_res_size=8", "model.low_res_noise={max_step: 5, num_timesteps: 20, schedule: linear}"],
         ["model.low_res_noise: diffusion.num_timesteps=20 is too few"]),
        (["model.low_res_size=8", "train.sample_grid={num_images: 4, low_res_noise: 3}"],
         ["train.sample_grid.low_res_noise=3", "max_step"]),
        (["model.low_res_size=8", NOISY,
          "train.sample_grid={num_images: 4, low_res_noise: 3, augmentation: truncated}"],
         ["train.sample_grid.augmentation=truncated", "non_truncated"]),
        (["train.sample_grid={num_images: 4, augmentation: truncated}"],
         ["train.sample_grid.augmentation=truncated", "low_res_noise"]),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(tiny_config: Path, settings: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tiny_config, settings)
    assert all(text in str(error.value) for text in said)


def test_the_process_of_the_noise_is_the_runs_own_unless_said(tiny_config: Path) -> None:
    own = load_config(tiny_config, [*LARGE, NOISY])
    assert own.low_res_process == own.diffusion
    other = load_config(
        tiny_config, [*LARGE, NOISY, "model.low_res_noise.num_timesteps=200", "model.low_res_noise.schedule=linear"]
    ).low_res_process
    assert other is not None
    assert (other.num_timesteps, other.schedule) == (200, "linear")
    shape = ["diffusion.schedule=sigmoid", "diffusion.sigmoid_start=0", "diffusion.sigmoid_tau=0.5"]
    kept = load_config(tiny_config, [*LARGE, NOISY, *shape, "model.low_res_noise.num_timesteps=200"]).low_res_process
    assert kept is not None
    assert kept.schedule_shape == {"start": 0, "end": 3, "tau": 0.5}
    unshaped = load_config(tiny_config, [*LARGE, NOISY, *shape, "model.low_res_noise.schedule=cosine"])
    assert unshaped.low_res_process == own.diffusion  # its own shape has no part in a cosine
    assert load_config(tiny_config, LARGE).low_res_process is None


def test_draw_is_what_sample_rounds(tiny_config: Path) -> None:
    stage = make_stage(tiny_config, *SMALL)
    bare = draw(stage, range(2), labels=None, low_res=None, low_res_step=0, seed=0, stage_number=0, device="cpu",
                progress=lambda: None)  # fmt: skip
    assert torch.equal(to_uint8(bare), sample(stage, range(2)))
