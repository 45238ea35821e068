"""The bound by timestep, and the rate-distortion curve that it draws.

Read from t = T-1 down, the bound is a progressive code (Ho et al. 2020, section 4.3): the prior's bits L_T, then term
after term, and after each a receiver holds x_t and can guess x_0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from evaluation.nll.plan import Plan, cell_edges
from evaluation.nll.sweep import Sweep
from evaluation.nll.terms import Terms

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """By cell of t, [cells] each but the edges: cell c is edges[c] <= t < edges[c + 1]. NaN: no call was there."""

    edges: NDArray[np.int64]  # [cells + 1]
    bits: Array  # mean L_t, bits/dim a step
    bits_stderr: Array  # over the replicates
    mse: Array  # of eps
    xstart_mse: Array  # of x_0 in [-1, 1]
    rate: Array  # bits/dim received when x_t is known, at the cell's middle: L_T and all terms of later steps
    distortion: Array  # root mean square error of the x_0 guessed from x_t, on the grey levels 0 .. 255
    prior: float  # L_T

    @property
    def centre(self) -> Array:
        """The middle of each cell's timesteps."""
        middle: Array = (self.edges[:-1] + self.edges[1:] - 1) / 2
        return middle

    def arrays(self) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """What is stored."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}


def swept_profile(sweep: Sweep) -> Profile:
    """The profile over all t one by one."""
    edges = np.arange(len(sweep.bits_by_t) + 1)
    prior = float(sweep.prior.mean(dtype=np.float64))
    return _profile(edges, sweep.bits_by_t, sweep.bits_stderr_by_t, sweep.mse_by_t, sweep.xstart_mse_by_t, prior)


def sampled_profile(plan: Plan, terms: Terms, num_timesteps: int) -> Profile:
    """The profile over cells that are fine at both ends."""
    edges = cell_edges(num_timesteps)
    cells, replicates = len(edges) - 1, plan.num_replicates
    cell = np.searchsorted(edges, plan.t, side="right") - 1
    # Sums over the cell's steps, by replicate; over all cells they add up to the bound.
    sums = _by_cell(plan.replicate * cells + cell, plan.weight * terms.bits, replicates * cells).reshape(replicates, -1)
    sums /= np.bincount(plan.replicate)[:, None]
    stderr = sums.std(axis=0, ddof=1) / np.sqrt(replicates)
    mse, xstart_mse = (_weighted_mean(cell, plan.weight, x, cells) for x in (terms.mse, terms.xstart_mse))
    return _profile(edges, sums.mean(axis=0), stderr, mse, xstart_mse, float(terms.prior.mean(dtype=np.float64)))


def _profile(
    edges: NDArray[np.int64], bits: Array, stderr: Array, mse: Array, xstart_mse: Array, prior: float
) -> Profile:  # fmt: skip
    """`bits` and their `stderr`: of the sum over each cell's steps."""
    width = np.diff(edges)
    later = np.cumsum(bits[::-1])[::-1] - bits  # terms of the cells above
    return Profile(
        edges=edges,
        bits=bits / width,
        bits_stderr=stderr / width,
        mse=mse,
        xstart_mse=xstart_mse,
        rate=prior + later + bits * (width - 1) / (2 * width),  # of the cell's own steps, those above its middle
        distortion=127.5 * np.sqrt(xstart_mse),
        prior=prior,
    )


def _weighted_mean(cell: NDArray[np.int64], weight: Array, x: NDArray[np.float32], num_cells: int) -> Array:
    """Mean over a cell's timesteps: calls weighted by the inverse of how likely they were."""
    with np.errstate(invalid="ignore"):
        mean: Array = _by_cell(cell, weight * x, num_cells) / _by_cell(cell, weight, num_cells)
    return mean


def _by_cell(cell: NDArray[np.int64], x: Array, num_cells: int) -> Array:
    return np.bincount(cell, weights=x, minlength=num_cells).astype(np.float64)
