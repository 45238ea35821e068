"""A cascade that can be solved for by hand: images are Gaussian, small images their block averages.

Pixels of a channel are correlated by their distance, channels are independent. What a perfect network says, given x_t
and a small image with or without noise, is then the mean of a Gaussian, linear in both.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.cascade import step_reached
from trainer.config.run import RunConfig, load_config
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.low_res_noise import LowResNoise
from trainer.sampling import Stage

MEAN, SPREAD, REACH = 0.1, 0.15, 3.0  # of a pixel; the last is the distance over which correlation falls by e
LARGEST = 16
EXACTLY = 1e-6  # variance of what is told without noise: rounding to 8 bits alone has 5e-6


@lru_cache(maxsize=8)
def covariance(size: int) -> Tensor:
    """Of one channel's pixels at a size: [size², size²] float64."""
    if size < LARGEST:
        average = averages(LARGEST, size)
        return average @ covariance(LARGEST) @ average.T
    place = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    return SPREAD**2 * torch.exp(-torch.cdist(place, place) / REACH)


@lru_cache(maxsize=8)
def averages(size: int, low_res_size: int) -> Tensor:
    """The matrix that makes a small image of a large one: [low_res_size², size²] float64."""
    block = size // low_res_size
    one = torch.eye(low_res_size, dtype=torch.float64).repeat_interleave(block, dim=1) / block  # of a row or column
    return torch.kron(one, one)


class PerfectNetwork(nn.Module):
    """Says E[x_0 | x_t, z_s]; made for prediction=x0 and rescale_timesteps=false."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.model = config.model
        self.process = GaussianDiffusion.create(config.diffusion)
        process = config.low_res_process
        self.low_res_noise = LowResNoise.create(process) if process else None
        self.prior = torch.linalg.inv(covariance(config.model.image_size))
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, time: Tensor,
        labels: Tensor | None = None, low_res: Tensor | None = None, low_res_time: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        step = 0 if low_res_time is None else int(low_res_time[0])
        on_x, on_z = self.weights(int(time[0]), step)
        alpha, _ = self._level(self.process, int(time[0]))
        deviation = (x.double() - alpha * MEAN).flatten(2) @ on_x.T
        if low_res is not None:
            alpha_s, _ = self._level(self.low_res_noise.process, step) if self.low_res_noise and step else (1.0, 0.0)
            deviation = deviation + (low_res.double() - alpha_s * MEAN).flatten(2) @ on_z.T
        return (MEAN + deviation).view(x.shape).float()

    def weights(self, t: int, s: int) -> tuple[Tensor, Tensor]:
        """Of x_t and z_s, less their means, in E[x_0 | x_t, z_s] less its own."""
        if (t, s) not in self._known:
            alpha, sigma = self._level(self.process, t)
            precision, on_z = self.prior + alpha**2 / sigma**2 * torch.eye(len(self.prior)), torch.zeros(0)
            if self.model.low_res_size:
                average, alpha_s, variance = averages(self.model.image_size, self.model.low_res_size), 1.0, EXACTLY
                if s:
                    assert self.low_res_noise is not None
                    alpha_s, sigma_s = self._level(self.low_res_noise.process, s)
                    variance = sigma_s**2
                precision = precision + alpha_s**2 / variance * average.T @ average
                on_z = alpha_s / variance * torch.linalg.solve(precision, average.T)
            self._known[t, s] = alpha / sigma**2 * torch.linalg.inv(precision), on_z
        return self._known[t, s]

    @staticmethod
    def _level(process: GaussianDiffusion, step: int) -> tuple[float, float]:
        level = process.schedule.level(step)
        return level.alpha, level.sigma


def perfect_stage(
    path: Path, size: int, low_res_size: int, sampling: SamplingConfig, *, max_step: int | None = None
) -> Stage:  # fmt: skip
    """A stage of 1000 steps with a perfect network; with `max_step` it is told how noisy small images are."""
    settings = [
        f"model.image_size={size}", "model.channel_mult=[1]", "model.attention_resolutions=[]", f"name=stage{size}",
        f"model.low_res_size={low_res_size}", "diffusion.num_timesteps=1000", "diffusion.prediction=x0",
        "diffusion.variance=fixed_small", "diffusion.objective=simple", "diffusion.rescale_timesteps=false",
    ]  # fmt: skip
    if max_step is not None:
        settings.append(f"model.low_res_noise.max_step={max_step}")
    config = load_config(path, settings)
    return Stage(PerfectNetwork(config), config, sampling)


def sampled_covariance(stages: list[Stage]) -> Tensor:
    """Of one channel's pixels as DDIM without noise must make them: every step is linear. [size², size²] float64

    The last stage's, from all that go before: closed form, without a sample.
    """
    spread = torch.zeros(0, 0, dtype=torch.float64)  # of what the stage is given
    for stage, above in zip(stages, [*stages[1:], None], strict=True):
        truncated = above is not None and above.sampling.augmentation == "truncated"
        stop = above.sampling.low_res_noise if above is not None and truncated else 0
        told = stage.sampling.low_res_noise
        if stage is not stages[0] and stage.sampling.augmentation == "truncated":
            told = step_reached(stages[0].config.diffusion, stage.sampling, told)  # all stages visit the same steps
        on_noise, on_z = _linear_map(stage, told, stop)
        spread = on_noise @ on_noise.T + (on_z @ spread @ on_z.T if len(spread) else 0)
        if above is not None and above.sampling.low_res_noise and not truncated:
            level = GaussianDiffusion.create(stage.config.diffusion).schedule.level(above.sampling.low_res_noise)
            spread = level.alpha**2 * spread + level.sigma**2 * torch.eye(len(spread))
    return spread


def _linear_map(stage: Stage, told: int, stop: int) -> tuple[Tensor, Tensor]:
    """The matrices that take x_T and z_s, less its mean, to where the stage ends, less that mean."""
    network, process = stage.network, GaussianDiffusion.create(stage.config.diffusion, "cpu", stage.sampling.respacing)
    assert isinstance(network, PerfectNetwork)
    schedule, pixels = process.schedule, stage.config.model.image_size**2
    on_noise = torch.eye(pixels, dtype=torch.float64)
    on_z = torch.zeros(pixels, stage.config.model.low_res_size**2, dtype=torch.float64)
    for step in range(process.num_timesteps - 1, max(schedule.last_step(stop), -1), -1):
        here, there = schedule.level(step), schedule.level(step - 1)
        x0_of_x, x0_of_z = network.weights(int(schedule.timestep_map[step]), told)
        keep = there.sigma / here.sigma
        on_x0 = there.alpha - keep * here.alpha
        on_z = keep * on_z + on_x0 * (x0_of_x @ on_z + x0_of_z if on_z.numel() else on_z)
        on_noise = keep * on_noise + on_x0 * x0_of_x @ on_noise
    return on_noise, on_z
