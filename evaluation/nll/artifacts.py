"""What a likelihood estimate leaves beside its record: its calls, the profile over t, figures, prior art's files.

- `nll.npz`, of a sampled estimate: the plan and what each call saw. The bound is `mean(weight * bits + prior)`; no
  network is needed to recompute it, or its standard error (`nll.summary`). Call i's noise is number `noise_start + i`
  of stream NLL_NOISE of `seed` (`data_pipeline.counter_rng.normal`).
- `nll.npz`, of an exact sweep: its sums by image; the bound is `mean(bits + prior)`. See `nll.sweep`.
- `nll_per_t.npz`, `nll_per_t.png`, `rate_distortion.png`: see `nll.profile`.
- of an exact sweep also `vb_terms.npz`, `mse_terms.npz`, `xstart_mse_terms.npz`, as image_nll.py of
  openai/improved-diffusion writes them: `arr_0` [T] float32, means over images, from t = T-1 down to 0.
"""

from __future__ import annotations

import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.counter_rng import Stream
from data_pipeline.files import write_atomic
from evaluation.nll.profile import Profile, sampled_profile, swept_profile
from evaluation.nll.rounds import Drawn
from evaluation.nll.sweep import Sweep
from evaluation.report.figures import save_figure
from evaluation.report.nll_figures import draw_per_t, draw_rate_distortion


def write_artifacts(folder: Path, seen: Drawn | Sweep, num_timesteps: int, *, seed: int) -> None:
    """Write the files above into `folder`."""
    if isinstance(seen, Sweep):
        by_t = swept_profile(seen)
        arrays = {name: getattr(seen, name) for name in ("image", "bits", "prior", "decoder")}
        _write_prior_art(folder, by_t)
    else:
        plan, (terms,) = seen.plan, seen.terms
        by_t = sampled_profile(plan, terms, num_timesteps)
        arrays = {f.name: getattr(of, f.name) for of in (plan, terms) for f in fields(of)}
    _save(
        folder / "nll.npz", **{name: _compact(values) for name, values in arrays.items()},
        seed=seed, noise_stream=int(Stream.NLL_NOISE), num_timesteps=num_timesteps,
    )  # fmt: skip
    _save(folder / "nll_per_t.npz", **by_t.arrays())
    save_figure(draw_per_t(by_t), folder / "nll_per_t.png")
    save_figure(draw_rate_distortion(by_t), folder / "rate_distortion.png")


def _write_prior_art(folder: Path, by_t: Profile) -> None:
    for name, values in (("vb", by_t.bits), ("mse", by_t.mse), ("xstart_mse", by_t.xstart_mse)):
        _save(folder / f"{name}_terms.npz", arr_0=values[::-1].astype(np.float32))


def _compact(values: Any) -> Any:
    """Whole numbers in the fewest bytes."""
    if isinstance(values, np.ndarray) and values.dtype == np.int64:
        return values.astype(np.min_scalar_type(int(values.max())))
    return values


def _save(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())
