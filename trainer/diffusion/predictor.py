"""What a sampler asks at a step: the network, read, bounded and guided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion, Prediction
from trainer.diffusion.thresholding import Threshold, static

# (x_t [B, C, H, W], network time [B]) -> the scaled gradient of log p(y | x_t) in x_t, [B, C, H, W].
Score = Callable[[Tensor, Tensor], Tensor]
# sigma / alpha above which algorithm 2 leaves a score out. Its x_0 holds sigma² / alpha times the score: what a
# classifier falsely says of almost pure noise, where the true gradient is next to nothing, would be all that is left
# of the image. The paper's linear schedule begins at 157 and is guided throughout; a cosine one begins at 80,000.
LARGEST_GUIDED_SIGMA = 160.0


@dataclass(frozen=True)
class Predictor:
    """A network on one process, as samplers use it.

    With a `score`, which leads to images of a class as a classifier sees them, it is guided in one of the two ways of
    Dhariwal & Nichol 2021: calling it is algorithm 2, `with_shifted_mean` algorithm 1.
    """

    denoiser: Denoiser
    diffusion: GaussianDiffusion
    threshold: Threshold | None = static  # of every predicted x_0; None: as it is
    score: Score | None = None

    def __call__(self, x: Tensor, step: int) -> Prediction:
        """The prediction at a step of the (respaced) process: for any sampler.

        With a score, eps - sigma * score takes the place of eps (algorithm 2), and x_0 and the mean follow from it:
        that x_0 may leave the range again. Above LARGEST_GUIDED_SIGMA it is left out.
        """
        prediction, t, time = self._bare(x, step)
        if self.score is None or self.diffusion.schedule.level(step).scaled_sigma > LARGEST_GUIDED_SIGMA:
            return prediction
        _, sigma = self.diffusion.signal_and_noise(t, x)
        x0, eps = self.diffusion.x0_and_eps("eps", prediction.eps - sigma * self.score(x, time), x, t)
        return replace(prediction, x0=x0, eps=eps, mean=self.diffusion.q_posterior(x0, x, t)[0])

    def with_shifted_mean(self, x: Tensor, step: int) -> Prediction:
        """The prediction whose mean a score moves by variance * score (algorithm 1): for ancestral sampling.

        Its x_0 and eps stay those of the network. The score is that at x_t, as in the published code.
        """
        prediction, _, time = self._bare(x, step)
        if self.score is None:
            return prediction
        return replace(prediction, mean=prediction.mean + prediction.log_variance.exp() * self.score(x, time))

    def _bare(self, x: Tensor, step: int) -> tuple[Prediction, Tensor, Tensor]:
        """Without a score; with the step and the network's time, each [B]."""
        t = torch.full((len(x),), step, device=x.device)
        time = self.diffusion.network_time(t)
        return self.diffusion.predict(self.denoiser(x, time), x, t, threshold=self.threshold), t, time
