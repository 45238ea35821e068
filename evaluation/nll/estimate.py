"""Negative log-likelihood: the variational bound L_vlb in bits/dim, with a standard error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import ShardDataset
from evaluation.chunks import Chunks
from evaluation.nll.artifacts import write_artifacts
from evaluation.nll.rounds import Drawn, bound, draw
from evaluation.nll.settings import NllSettings
from evaluation.nll.summary import Mean, exact_mean, sampled_mean
from evaluation.nll.sweep import Sweep, sweep
from evaluation.nll.terms import Conditioner, NetworkTerms
from trainer.diffusion.gaussian import GaussianDiffusion


@dataclass(frozen=True)
class NllEstimate:
    """L_vlb = prior + middle + decoder, in bits/dim, averaged over the split's images."""

    total: Mean
    parts: dict[str, Mean]  # "prior" L_T, "middle" L_1 .. L_{T-1}, "decoder" L_0
    num_calls: int  # network calls (images through the network), pilot included
    num_pilot_calls: int
    num_rounds: int
    num_images: int  # different ones that were looked at
    seed: int
    settings: NllSettings
    measured: dict[str, Any]  # what exactly was estimated, for the record
    seen: Drawn | Sweep  # what the calls saw

    @property
    def bits_per_dim(self) -> float:
        return self.total.value

    @property
    def stderr(self) -> float | None:
        """Of the split's mean; None where a single replicate, or an exact sweep of the whole split, gives none."""
        return self.total.stderr

    @property
    def interval95(self) -> tuple[float, float] | None:
        return self.total.interval95

    @property
    def stderr_time_noise(self) -> float | None:
        return self.total.stderr_time_noise

    @property
    def stderr_images(self) -> float | None:
        return self.total.stderr_images

    @property
    def prior(self) -> float:
        return self.parts["prior"].value

    @property
    def middle(self) -> float:
        return self.parts["middle"].value

    @property
    def decoder(self) -> float:
        return self.parts["decoder"].value

    @property
    def num_replicates(self) -> int:
        return self.total.num_replicates

    def details(self) -> dict[str, Any]:
        """What came out beside the value, for the record: all of it JSON."""
        names = ("stderr_time_noise", "stderr_images", "stderr_population", "interval95")
        found: dict[str, Any] = {name: getattr(self.total, name) for name in names}
        for name, part in self.parts.items():
            found |= {name: part.value, f"{name}_stderr": part.stderr}
        counts = ("num_images", "num_replicates", "num_rounds", "num_pilot_calls")
        found |= {name: getattr(self, name) for name in counts}
        target = self.settings.target_stderr
        if target is not None:
            found |= {"target_stderr": target, "target_reached": self.stderr is not None and self.stderr <= target}
        return found

    def write_artifacts(self, folder: Path) -> None:
        """Write what the calls saw, the profile over t, and figures: see `nll.artifacts`."""
        write_artifacts(folder, self.seen, self.measured["num_timesteps"], seed=self.seed)


def estimate_nll(
    condition: Conditioner,
    diffusion: GaussianDiffusion,
    dataset: ShardDataset,
    settings: NllSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    chunks: Chunks | None = None,
    title: str = "",
    final: bool = False,
) -> NllEstimate:
    """Estimate the mean bound over the split's images.

    Args:
        diffusion: the chain whose bound it is, already the shorter one where `settings.respacing` says so.
        chunks: where the work is kept and shared between processes; by default it is all done here and now.
        title: of the progress bars; none without one.
        final: nothing of the job is shared after this estimate: only its first process need sum it up.

    Raises:
        UserError: settings that give no estimate of this split; a term of the bound that is not finite.
        FinishedElsewhere: another process has written the job's result, or will (`final`).
    """
    total = len(dataset)
    settings.check(total)
    look = NetworkTerms(
        condition, diffusion, dataset, seed, device, settings.clip_denoised, chunks or Chunks(), title
    )  # fmt: skip
    num_timesteps = diffusion.num_timesteps
    seen: Drawn | Sweep
    if settings.mode == "exact":
        seen = sweep(look, num_timesteps, total, settings.num_images or total, seed=seed, final=final)
        num_pilot, num_rounds, num_calls, images = 0, 1, seen.num_calls, seen.image
    else:
        seen = draw(
            [look], settings, num_timesteps, total, seed=seed, stderr=lambda d: bound(d, total).stderr or 0.0,
            final=final,
        )  # fmt: skip
        num_pilot, num_rounds, images = seen.num_pilot, seen.num_rounds, seen.plan.image
        num_calls = len(seen.plan) + num_pilot
    whole, parts = _means(seen, total)
    return NllEstimate(
        total=whole,
        parts=parts,
        num_calls=num_calls,
        num_pilot_calls=num_pilot,
        num_rounds=num_rounds,
        num_images=len(np.unique(images)),
        seed=seed,
        settings=settings,
        measured={
            "bound": "L_vlb",
            "mode": settings.mode,
            "num_timesteps": num_timesteps,
            "trained_timesteps": diffusion.trained.num_timesteps,
            "respacing": settings.respacing,
            "clip_denoised": settings.clip_denoised,
        },
        seen=seen,
    )


def _means(seen: Drawn | Sweep, num_images: int) -> tuple[Mean, dict[str, Mean]]:
    """The bound and its parts, as estimates for the split of so many images."""
    if isinstance(seen, Sweep):
        by_part = {"prior": seen.prior, "middle": seen.bits - seen.decoder, "decoder": seen.decoder}
        return exact_mean(seen.values, num_images), {name: exact_mean(x, num_images) for name, x in by_part.items()}
    plan, (terms,) = seen.plan, seen.terms
    weighted, first = plan.weight * terms.bits, plan.t == 0
    by_part = {
        "prior": terms.prior.astype(np.float64),
        "middle": np.where(first, 0.0, weighted),
        "decoder": np.where(first, weighted, 0.0),
    }
    return bound(seen, num_images), {name: sampled_mean(x, plan, num_images) for name, x in by_part.items()}
