"""Negative log-likelihood: the variational bound L_vlb in bits/dim, with a standard error.

Images enter as exact grey levels k / 127.5 - 1: no flips, no resizing. The network predicts in its own precision,
all terms are computed in float32 from its float32 output and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, normal
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from data_pipeline.progress import progress_bar
from evaluation.nll import plan as nll_plan
from evaluation.nll.plan import Plan
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion

Mode = Literal["importance", "exact"]
# Calls are made in chunks of this size, in the plan's order: fixed, so that sums never depend on who made them.
CHUNK = 64


@dataclass(frozen=True)
class NllEstimate:
    """L_vlb = prior + middle + decoder, in bits/dim, averaged over images."""

    bits_per_dim: float
    stderr: float | None  # None where a single replicate gives none
    prior: float  # L_T
    middle: float  # L_1 .. L_{T-1}
    decoder: float  # L_0
    num_calls: int  # network calls (images through the network), pilot included
    num_images: int
    num_replicates: int
    measured: dict[str, Any]  # what exactly was estimated, for the record

    def details(self) -> dict[str, Any]:
        """What came out beside the value."""
        names = ("prior", "middle", "decoder", "num_images", "num_replicates")
        return {name: getattr(self, name) for name in names}


# Labels [n] of the dataset's samples -> the denoiser that knows them (unconditional nets ignore them).
Conditioner = Callable[[NDArray[np.int64]], Denoiser]


def estimate_nll(
    condition: Conditioner,
    diffusion: GaussianDiffusion,
    dataset: ShardDataset,
    *,
    mode: Mode = "importance",
    num_calls: int = 2048,
    num_images: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: str = "",
) -> NllEstimate:
    """Estimate the mean bound over the split's images.

    Args:
        num_calls: budget of network calls in importance mode; the pilot's are on top and counted in the result.
        num_images: images swept over all T steps in exact mode.
        progress: the progress bar's title; no bar without one.

    Raises:
        UserError: too few calls for an error bar; a term of the bound that is not finite.
    """
    evaluator = _Evaluator(condition, diffusion, dataset, seed, device)
    num_steps, total = diffusion.num_timesteps, len(dataset)
    if mode == "exact":
        plan = nll_plan.exact_plan(num_steps, total, min(num_images, total), seed=seed)
        terms = evaluator.terms(plan, progress)
        return _summarise(plan, terms, evaluator.prior(plan), diffusion, mode, extra_calls=0)
    nll_plan.check_num_calls(num_calls)
    pilot = nll_plan.pilot_plan(num_steps, total, num_calls, seed=seed)
    p = nll_plan.probabilities(pilot, evaluator.terms(pilot, progress and f"{progress} (pilot)"), num_steps)
    plan = nll_plan.importance_plan(p, total, num_calls, seed=seed)
    terms = evaluator.terms(plan, progress)
    return _summarise(plan, terms, evaluator.prior(plan), diffusion, mode, extra_calls=len(pilot))


class _Evaluator:
    """Computes the terms of a plan."""

    def __init__(
        self, condition: Conditioner, diffusion: GaussianDiffusion, dataset: ShardDataset, seed: int,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self._condition, self._diffusion, self._dataset = condition, diffusion, dataset
        self._seed, self._device = seed, device

    def terms(self, plan: Plan, progress: str) -> NDArray[np.float64]:
        """L_t of every call in bits/dim: [num_calls]."""
        results = np.empty(len(plan))
        with progress_bar(total=len(plan), unit="call", description=progress, disable=not progress) as bar:
            for start in range(0, len(plan), CHUNK):
                chunk = slice(start, min(start + CHUNK, len(plan)))
                results[chunk] = self._chunk(plan, chunk)
                if not np.isfinite(results[chunk]).all():
                    t = plan.t[chunk][~np.isfinite(results[chunk])][0]
                    raise UserError(
                        f"the bound of this network is not finite at t={t}: its training has diverged, or has hardly "
                        "begun. Evaluate another export."
                    )
                bar.update(chunk.stop - start)
        return results

    @torch.inference_mode()
    def _chunk(self, plan: Plan, chunk: slice) -> NDArray[np.float64]:
        x0, labels = self._load(plan.image[chunk])
        noise = normal(
            self._seed, Stream.NLL_NOISE, plan.noise_start + chunk.start, chunk.stop - chunk.start, x0.shape[1:]
        )
        t = torch.from_numpy(plan.t[chunk]).to(self._device)
        x_t = self._diffusion.q_sample(x0, t, torch.from_numpy(noise).to(self._device))
        output = self._condition(labels)(x_t, self._diffusion.network_time(t)).float()
        prediction = self._diffusion.predict(output, x_t, t, clip=True)
        bits: NDArray[np.float64] = self._diffusion.vb_terms(prediction, x0, x_t, t).double().cpu().numpy()
        return bits

    @torch.inference_mode()
    def prior(self, plan: Plan) -> NDArray[np.float64]:
        """L_T of every call's image in bits/dim: [num_calls]; it needs no network, and each image once."""
        images, inverse = np.unique(plan.image, return_inverse=True)
        bits: NDArray[np.float64] = np.empty(len(images))
        for start in range(0, len(images), CHUNK):
            x0, _ = self._load(images[start : start + CHUNK])
            bits[start : start + CHUNK] = self._diffusion.prior_bits(x0).double().cpu().numpy()
        result: NDArray[np.float64] = bits[inverse]
        return result

    def _load(self, samples: NDArray[np.int64]) -> tuple[torch.Tensor, NDArray[np.int64]]:
        images, labels = self._dataset.read(samples)
        return torch.from_numpy(images).to(self._device).float() / 127.5 - 1, labels


def _summarise(
    plan: Plan, terms: NDArray[np.float64], prior: NDArray[np.float64], diffusion: GaussianDiffusion, mode: Mode,
    *, extra_calls: int,
) -> NllEstimate:  # fmt: skip
    replicates = plan.num_replicates

    def by_replicate(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(plan.replicate, weights=values, minlength=replicates).astype(np.float64)

    weighted = plan.weight * terms
    first = plan.t == 0
    decoder = by_replicate(np.where(first, weighted, 0.0))  # [R]
    middle = by_replicate(np.where(first, 0.0, weighted))
    last = by_replicate(prior) / by_replicate(np.ones(len(plan)))
    totals = decoder + middle + last
    measured = {
        "bound": "L_vlb",
        "mode": mode,
        "num_timesteps": diffusion.num_timesteps,
        "clip_denoised": True,
    }
    return NllEstimate(
        bits_per_dim=float(totals.mean()),
        stderr=float(totals.std(ddof=1) / np.sqrt(replicates)) if replicates > 1 else None,
        prior=float(last.mean()),
        middle=float(middle.mean()),
        decoder=float(decoder.mean()),
        num_calls=len(plan) + extra_calls,
        num_images=len(np.unique(plan.image)),
        num_replicates=replicates,
        measured=measured,
    )
