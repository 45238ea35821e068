"""A grid of samples as a PNG, to see what a network has learned."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.samplers import SAMPLERS, Progress, SampleNoise, to_uint8
from trainer.diffusion.schedules import strided_steps
from trainer.models import IMAGE_CHANNELS


def conditioned(network: nn.Module, labels: Tensor | None = None, low_res: Tensor | None = None) -> Denoiser:
    """The network as a function of (x_t, time) alone."""

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = network(x, time, labels, low_res)
        return output

    return denoise


def sample_images(
    network: nn.Module,
    config: RunConfig,
    seeds: range,
    *,
    num_steps: int,
    sampler: str,
    low_res: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = lambda: None,
) -> Tensor:
    """Samples number seeds[0], seeds[1], ... as uint8 [n, C, H, W]; class-conditional nets cycle through the classes.

    `low_res` [n, C, h, w] in [-1, 1]: what a super-resolution network is to enlarge.
    """
    steps = strided_steps(config.diffusion.num_timesteps, min(num_steps, config.diffusion.num_timesteps))
    diffusion = GaussianDiffusion.create(config.diffusion, device, steps)
    size = config.model.image_size
    noise = SampleNoise(seeds, (IMAGE_CHANNELS, size, size), seed=seed, device=str(device))
    labels = None
    if config.model.num_classes:
        labels = torch.tensor([s % config.model.num_classes for s in seeds], device=device)
    denoiser = conditioned(network, labels, low_res)
    images: Tensor = SAMPLERS[sampler](denoiser, noise, diffusion, progress=progress)
    return to_uint8(images).cpu()


def save_grid(images: Tensor, path: Path) -> None:
    """Write uint8 images [n, 3, H, W] as a nearly square PNG with a one-pixel gap, enlarged when they are small."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    factor = max(1, 64 // height)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, format="PNG")
    temporary.rename(path)
