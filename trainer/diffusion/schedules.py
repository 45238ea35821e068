"""Noise schedules and the tables that follow from one.

Tables are built and kept in float64: 1 - alphas_cumprod starts near 1e-5 and cumulative products over thousands of
steps lose their low digits in float32. Values are cast to the images' type only when gathered for a batch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import ConfigError
from trainer.diffusion.respacing import space_timesteps

MAX_BETA = 0.999  # keeps the last step of the cosine schedule from being singular


def linear_betas(num_timesteps: int) -> NDArray[np.float64]:
    """Betas from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, section 4), scaled by 1000 / T otherwise: [T].

    Raises ConfigError where that scaling makes a beta reach 1.
    """
    scale = 1000.0 / num_timesteps
    betas = np.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=np.float64)
    if betas[-1] >= 1:
        raise ConfigError(
            f"diffusion.num_timesteps={num_timesteps}: the linear schedule needs more than 20 steps "
            "(beta reaches 1); use more, or diffusion.schedule=cosine."
        )
    return betas


def cosine_betas(num_timesteps: int, offset: float = 0.008) -> NDArray[np.float64]:
    """Betas whose alphas_cumprod follow cos²(π/2 · (t/T + s) / (1 + s)) (Nichol & Dhariwal 2021, eq. 17): [T]."""
    # math.cos: numpy's may differ in the last digit, and the published tables are to be met bit for bit.
    angles = [(t / num_timesteps + offset) / (1 + offset) * math.pi / 2 for t in range(num_timesteps + 1)]
    alphas_cumprod = np.array([math.cos(angle) ** 2 for angle in angles])
    betas: NDArray[np.float64] = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], MAX_BETA)
    return betas


def sigmoid_betas(
    num_timesteps: int, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0
) -> NDArray[np.float64]:  # fmt: skip
    """Betas whose alphas_cumprod follow the falling sigmoid of (start + (end - start) t/T) / tau, from 1 to 0: [T].

    Jabri et al. 2022 and Chen 2023 (algorithm 1), who bound alphas_cumprod by 1e-9 from below; here MAX_BETA bounds its
    last step, which leaves a thousandth of the one before.
    """

    def falling(t: float) -> float:
        return 1 / (1 + math.exp((start + (end - start) * t) / tau))

    first, last = falling(0), falling(1)
    curve = np.array([falling(t / num_timesteps) for t in range(num_timesteps + 1)])
    alphas_cumprod = (curve - last) / (first - last)
    betas: NDArray[np.float64] = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], MAX_BETA)
    return betas


BETAS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "linear": linear_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas,
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """How noisy x is at a step: x = alpha * x_0 + sigma * eps."""

    alpha_cumprod: float  # alpha²

    @property
    def alpha(self) -> float:
        return math.sqrt(self.alpha_cumprod)

    @property
    def sigma(self) -> float:
        return math.sqrt(1 - self.alpha_cumprod)

    @property
    def scaled_sigma(self) -> float:
        """sigma / alpha, the noise beside an image of its own size: the sigma of Karras et al. 2022."""
        return self.sigma / self.alpha

    @property
    def half_logsnr(self) -> float:
        """log(alpha / sigma), the lambda of Lu et al. 2022; infinite for the image."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


IMAGE = Level(1.0)  # no noise is left


@dataclass(frozen=True)
class Schedule:
    """The tables of one process, each [T] in float64 on one device; index t = 0 is the least noisy step."""

    timestep_map: Tensor  # [T] int64: the step of the original process that each step stands for
    num_original: int  # steps of the original process
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_betas: Tensor
    fixed_large_log_variance: Tensor  # log beta, the first step's being posterior_log_variance's
    posterior_mean_x0: Tensor  # q(x_{t-1} | x_t, x_0) has mean posterior_mean_x0 * x_0 + posterior_mean_xt * x_t
    posterior_mean_xt: Tensor  # (Ho et al. 2020, eq. 7)
    posterior_log_variance: Tensor  # log beta-tilde; the first step's (zero variance) is the second's

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def first(self, num_steps: int) -> Schedule:
        """The tables of its first, least noisy steps alone: they are a process of their own."""
        tables: dict[str, Any] = {n: t[:num_steps] for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tables)

    def level(self, step: int) -> Level:
        """The level of a step, in numbers of the host; of the image itself for -1."""
        return self._levels[step] if step >= 0 else IMAGE

    @cached_property
    def _levels(self) -> list[Level]:
        """Read from the device once: samplers ask at every step, and must not wait for it."""
        return [Level(alpha_cumprod) for alpha_cumprod in self.alphas_cumprod.tolist()]

    def last_step(self, stop: int) -> int:
        """The step whose level is the lowest at or above `stop`, a step of the original process; -1 for 0: the image.

        Raises ConfigError for one above all steps.
        """
        if stop == 0:
            return -1
        steps = self._timestep_map
        if not 0 < stop <= steps[-1]:
            raise ConfigError(f"stop={stop}: the last visited step is {steps[-1]}; use 0 (the image) to {steps[-1]}.")
        return bisect_left(steps, stop)

    def original(self, step: int) -> int:
        """The step of the original process that a step stands for."""
        return self._timestep_map[step]

    @cached_property
    def _timestep_map(self) -> list[int]:
        steps: list[int] = self.timestep_map.tolist()
        return steps

    @staticmethod
    def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """table[t] in the type of `like` and shaped to multiply it: [B] -> [B, 1, 1, 1]."""
        return table[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


@lru_cache(maxsize=32)
def make_schedule(
    name: str, num_timesteps: int, device: str = "cpu", respacing: str | None = None, **shape: float
) -> Schedule:  # fmt: skip
    """The named schedule of T steps; with `respacing`, the shorter process that visits only some of them (eq. 19).

    `shape` are the schedule's own parameters. Cached, so that tables are built and uploaded once per device. Raises
    ConfigError where the schedule or the respacing does not fit T.
    """
    betas = BETAS[name](num_timesteps, **shape)
    timestep_map = np.arange(num_timesteps)
    if respacing is not None:
        alphas_cumprod = np.cumprod(1 - betas)
        half_logsnr = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
        timestep_map = np.array(space_timesteps(num_timesteps, respacing, half_logsnr.tolist()))
        alphas_cumprod = alphas_cumprod[timestep_map]
        betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    return schedule_of(betas, timestep_map, num_timesteps, device)


def schedule_of(
    betas: NDArray[np.float64], timestep_map: NDArray[np.int64], num_original: int, device: str = "cpu"
) -> Schedule:  # fmt: skip
    """The tables of a process of these betas; `timestep_map` as in `Schedule`."""
    alphas = 1 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.concatenate([[1.0], alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    if len(betas) > 1:
        posterior_variance[0] = posterior_variance[1]
    else:
        posterior_variance[0] = betas[0]

    def table(values: NDArray[np.floating[Any]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return Schedule(
        timestep_map=torch.tensor(timestep_map, dtype=torch.int64, device=device),
        num_original=num_original,
        betas=table(betas),
        alphas_cumprod=table(alphas_cumprod),
        alphas_cumprod_prev=table(alphas_cumprod_prev),
        sqrt_alphas_cumprod=table(np.sqrt(alphas_cumprod)),
        sqrt_one_minus_alphas_cumprod=table(np.sqrt(1 - alphas_cumprod)),
        log_betas=table(np.log(betas)),
        fixed_large_log_variance=table(np.log(np.concatenate([posterior_variance[:1], betas[1:]]))),
        posterior_mean_x0=table(betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod)),
        posterior_mean_xt=table((1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod)),
        posterior_log_variance=table(np.log(posterior_variance)),
    )
