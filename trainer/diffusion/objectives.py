"""Training objectives: L_simple, L_vlb and their hybrid (Nichol & Dhariwal 2021, section 3.1).

L_simple is the squared error of what the network predicts, or of the quantity that `mse_target` names (the eps-, x0-
or v-loss). L_vlb enters as T * L_t in bits/dim, so that its mean under uniform t is the bound. L_hybrid is
L_simple + weight * L_vlb; the weight goes by the names of the published code's two conventions:

- `rescaled`: 1 / 1000, whatever T ("rescale_learned_sigmas" on: L_t is multiplied by T / 1000).
- `unrescaled`: 1 / T ("rescale_learned_sigmas" off: L_t itself is added).

With `loss_weight: min_snr` what is minimised in place of L_simple is min(SNR, gamma) times the squared error of x_0
(Hang et al. 2023), whatever the network predicts and whichever error L_simple is.

A classifier of noisy images is trained with the cross-entropy of the true class given x_t (Dhariwal & Nichol 2021,
section 4 and appendix H).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.diffusion import DiffusionConfig
from trainer.diffusion.gaussian import GaussianDiffusion, Prediction

TOP = 5  # classes: "top 5" is asked where there are as many


@dataclass(frozen=True)
class Losses:
    """Per image, each [B]: what is minimised, and the figures that are shown of it, by name.

    - mse: L_simple without its weight, a mean over dimensions.
    - vb: T times the bound's term at t, an unbiased estimate of L_vlb in bits/dim under uniform t.
    - cross_entropy, of a classifier, in nats; accuracy and top5: 1 where the class is the first guess, among five.
    """

    loss: Tensor
    parts: dict[str, Tensor]


def part_names(config: DiffusionConfig, num_classes: int = 0) -> tuple[str, ...]:
    """The names of `Losses.parts` for an objective, and the classes that a classifier tells apart."""
    if config.objective == "cross_entropy":
        return ("cross_entropy", "accuracy", "top5") if num_classes >= TOP else ("cross_entropy", "accuracy")
    return {"simple": ("mse",), "vlb": ("vb",), "hybrid": ("mse", "vb")}[config.objective]


def training_losses(
    diffusion: GaussianDiffusion,
    config: DiffusionConfig,
    output: Tensor,
    *,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Losses:
    """The losses of a batch, unweighted (a timestep sampler's weights come on top).

    - simple: the squared error.
    - vlb: T * L_t in bits/dim.
    - hybrid: simple + vlb_factor * vlb, where the vlb term trains the variance alone (its mean is detached).

    A `loss_weight` multiplies the squared error in both.
    """
    prediction = diffusion.predict(output, x_t, t, threshold=None)
    if config.objective == "vlb":
        vb = diffusion.vb_terms(prediction, x0, x_t, t) * diffusion.num_timesteps
        return Losses(vb, {"vb": vb})
    target = config.mse_target or config.prediction
    error = diffusion.quantity(target, prediction.x0, prediction.eps, x_t, t) - diffusion.quantity(
        target, x0, noise, x_t, t
    )
    mse = error.square().flatten(1).mean(dim=1)
    weighted = mse if config.loss_weight == "none" else mse * min_snr_weight(diffusion, config, t).to(mse.dtype)
    if config.objective == "simple":
        return Losses(weighted, {"mse": mse})
    vb = diffusion.vb_terms(_detach_mean(prediction), x0, x_t, t) * diffusion.num_timesteps
    return Losses(weighted + config.vlb_factor * vb, {"mse": mse, "vb": vb})


def classification_losses(logits: Tensor, labels: Tensor) -> Losses:
    """The losses of a batch of a classifier: logits [B, num_classes], true classes [B]."""
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    # How many classes are ranked before the true one; one that is as likely is not.
    before = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # [B]
    parts = {"cross_entropy": cross_entropy, "accuracy": (before < 1).float()}
    if logits.shape[1] >= TOP:
        parts["top5"] = (before < TOP).float()
    return Losses(cross_entropy, parts)


def min_snr_weight(diffusion: GaussianDiffusion, config: DiffusionConfig, t: Tensor) -> Tensor:
    """What makes an error of L_simple min(SNR, gamma) times that of x_0, where SNR = ᾱ / (1 - ᾱ): [B] float64.

    Each error of L_simple is that of x_0 times a factor of t alone, which is divided out (Hang et al. 2023):
    SNR of the eps-loss, SNR + 1 of the v-loss, and of the mean of x_{t-1} the square of x_0's share in it.
    """
    s = diffusion.schedule
    snr = s.alphas_cumprod[t] / (1 - s.alphas_cumprod[t])
    target = config.mse_target or config.prediction
    if target == "eps":
        on_x0 = snr
    elif target == "v":
        on_x0 = snr + 1
    else:
        on_x0 = torch.ones_like(snr) if target == "x0" else s.posterior_mean_x0[t].square()
    return snr.clamp(max=config.min_snr_gamma) / on_x0


def _detach_mean(prediction: Prediction) -> Prediction:
    return replace(prediction, mean=prediction.mean.detach())
