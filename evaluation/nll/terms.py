"""The terms of the bound that a plan asks for, from a network, in chunks.

Images enter as exact grey levels k / 127.5 - 1: no flips, no resizing. The network predicts in its own precision,
all terms are computed in float32 from its float32 output and summed in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.counter_rng import Stream, normal
from data_pipeline.dataset import ShardDataset
from evaluation.chunks import Advance, Arrays, Chunks, concatenated, cut
from evaluation.nll.plan import Plan
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.thresholding import static
from trainer.exits import DivergedError

# Labels [n] of the dataset's samples -> the denoiser that knows them (unconditional nets ignore them).
Conditioner = Callable[[NDArray[np.int64]], Denoiser]
BATCH = 64  # images a network pass: fixed, since a network's rounding depends on it


@dataclass(frozen=True)
class Terms:
    """What each call of a plan saw, [num_calls] each, float32 as computed."""

    bits: NDArray[np.float32]  # L_t in bits/dim
    prior: NDArray[np.float32]  # L_T of its image in bits/dim; no network changes it
    mse: NDArray[np.float32]  # mean of (predicted eps - eps)^2
    xstart_mse: NDArray[np.float32]  # mean of (predicted x_0 - x_0)^2, images in [-1, 1]


def joined(rounds: Sequence[Terms]) -> Terms:
    """The terms of an estimate's rounds, one after the other."""
    return Terms(*(np.concatenate([getattr(t, name) for t in rounds]) for name in Terms.__dataclass_fields__))


@dataclass(frozen=True)
class NetworkTerms:
    """Computes the terms of plans."""

    condition: Conditioner
    diffusion: GaussianDiffusion
    dataset: ShardDataset
    seed: int
    device: torch.device | str
    clip_denoised: bool
    chunks: Chunks
    title: str

    def __call__(self, plan: Plan, kind: str, final: bool = False) -> Terms:
        """The terms of all calls; `kind` names their chunks, and with `final` the job ends with them.

        Raises DivergedError for a term that is not finite, FinishedElsewhere as `Chunks.results` does.
        """
        parts = cut(len(plan), BATCH)
        return Terms(**concatenated(self.stream(len(parts), lambda number: plan.part(parts[number]), kind, final)))

    def stream(
        self, num: int, plan_of: Callable[[int], Plan], kind: str, final: bool = False
    ) -> Iterator[Arrays]:  # fmt: skip
        """The terms of `num` plans, by name, one after the other: each is a chunk. Raises as `__call__` does."""

        def make(number: int, advance: Advance) -> Arrays:
            plan = plan_of(number)
            return concatenated(self._batch(plan.part(calls), advance) for calls in cut(len(plan), BATCH))

        return self.chunks.results(
            f"{kind}-{self._digest(num, plan_of)}", num, make, work=lambda number: len(plan_of(number)), unit="call",
            title=self.title and f"{self.title} ({kind})", final=final,
        )  # fmt: skip

    def _digest(self, num: int, plan_of: Callable[[int], Plan]) -> str:
        """Names the calls of these chunks: those that another plan left behind are not taken for them."""
        digest = hashlib.sha256(f"{self.seed} {BATCH}".encode())
        for plan in map(plan_of, range(num)):
            digest.update(f" {plan.noise_start} {len(plan)} ".encode())
            digest.update(plan.image.astype("<i8").tobytes() + plan.t.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    @torch.inference_mode()
    def _batch(self, plan: Plan, advance: Advance) -> Arrays:
        samples, which = np.unique(plan.image, return_inverse=True)
        images, labels = self.dataset.read(samples)
        x0s = torch.from_numpy(images).to(self.device).float() / 127.5 - 1
        rows = torch.from_numpy(which).to(self.device)
        prior, x0 = self.diffusion.prior_bits(x0s)[rows], x0s[rows]
        noise = torch.from_numpy(normal(self.seed, Stream.NLL_NOISE, plan.noise_start, len(x0), x0.shape[1:])).to(
            self.device
        )
        t = torch.from_numpy(plan.t).to(self.device)
        x_t = self.diffusion.q_sample(x0, t, noise)
        output = self.condition(labels[which])(x_t, self.diffusion.network_time(t)).float()
        prediction = self.diffusion.predict(output, x_t, t, threshold=static if self.clip_denoised else None)
        terms = {
            "bits": self.diffusion.vb_terms(prediction, x0, x_t, t),
            "prior": prior,
            "mse": (prediction.eps - noise).square().flatten(1).mean(dim=1),
            "xstart_mse": (prediction.x0 - x0).square().flatten(1).mean(dim=1),
        }
        arrays = {name: _float32(values) for name, values in terms.items()}
        finite = np.isfinite(arrays["bits"])
        if not finite.all():
            raise DivergedError(
                f"the bound of this network is not finite at t={plan.t[~finite][0]}: its training has diverged, "
                "or has hardly begun. Evaluate another export."
            )
        advance(len(x0))
        return arrays


def _float32(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.cpu().numpy()
    return array
