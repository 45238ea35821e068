"""An exact sweep: every timestep of images, one noise each. Sums are kept, not calls: a whole split has millions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.nll.plan import sweep_images, sweep_plan
from evaluation.nll.terms import NetworkTerms

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sweep:
    """By image [images], bits/dim each; and means over the images by timestep [T], from t = 0 up.

    The noise of image number i (in this order) at t is number i * T + t of the noise stream.
    """

    image: NDArray[np.int64]  # sample number in the data split
    bits: Array  # sum over t of L_t
    prior: Array  # L_T
    decoder: Array  # L_0
    bits_by_t: Array  # L_t
    bits_stderr_by_t: Array  # of its mean over images; NaN for a single one
    mse_by_t: Array  # of eps
    xstart_mse_by_t: Array  # of x_0 in [-1, 1]

    @property
    def values(self) -> Array:
        """Each image's bound, [images]."""
        return self.bits + self.prior

    @property
    def num_calls(self) -> int:
        return len(self.image) * len(self.bits_by_t)


def sweep(
    look: NetworkTerms, num_timesteps: int, num_images_total: int, num_images: int, *, seed: int, final: bool = False
) -> Sweep:  # fmt: skip
    """Sweep images of a split, in its random order; an image is a chunk.

    Raises UserError and FinishedElsewhere as `NetworkTerms` does.
    """
    images = sweep_images(num_images_total, num_images, seed=seed)
    by_image = np.zeros((3, num_images))
    by_t, squares = np.zeros((3, num_timesteps)), np.zeros(num_timesteps)
    made = look.stream(
        num_images, lambda n: sweep_plan(int(images[n]), num_timesteps, noise_start=n * num_timesteps), "exact", final
    )  # fmt: skip
    for number, terms in enumerate(made):
        bits = terms["bits"].astype(np.float64)
        by_image[:, number] = bits.sum(), terms["prior"][0], bits[0]
        # Running means, and squares around them (Welford 1962): no sum grows until it swallows differences.
        step = np.stack([bits, terms["mse"], terms["xstart_mse"]]) - by_t
        by_t += step / (number + 1)
        squares += step[0] * (bits - by_t[0])
    with np.errstate(invalid="ignore"):  # 0 / 0 of a single image
        stderr = np.sqrt(squares / np.float64(num_images - 1) / num_images)
    bits_sum, prior, decoder = by_image
    bits_mean, mse, xstart_mse = by_t
    return Sweep(images, bits_sum, prior, decoder, bits_mean, stderr, mse, xstart_mse)
