"""Which (image, timestep, noise) a likelihood estimate looks at, and with what weight.

The bound is a sum over T timesteps, L_vlb = L_T + sum_t L_t. One network call sees one L_t of one image; drawn with
probability p_t it enters as L_t / p_t, unbiased for every p > 0 and of least variance for p_t proportional to
sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, section 3.3, there for training). Here p comes from a pilot on other images
and noise, so that it is fixed before the estimate; a share of uniform draws keeps every weight bounded; t = 0, the
decoder's term, is a stratum of its own; the other draws are stratified through p's cumulative distribution. The
standard error comes from independent replicates, since the formula for independent draws would overstate it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator
from data_pipeline.errors import UserError

UNIFORM_SHARE = 0.1  # defensive mixture
PILOT_SHARE = 1 / 8  # of all calls
MIN_PILOT_PER_CELL = 2
MIN_CALLS = 128

_PILOT_BLOCK, _PLAN_BLOCK, _IMAGE_BLOCK = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Calls of an estimate, all arrays [num_calls]; call i's noise is number i of the noise stream."""

    image: NDArray[np.int64]  # sample number in the data split
    t: NDArray[np.int64]
    weight: NDArray[np.float64]  # of L_t in its replicate's sum
    replicate: NDArray[np.int64]
    noise_start: int  # number of the first call's noise
    num_replicates: int

    def __len__(self) -> int:
        return len(self.t)


def cell_edges(num_timesteps: int) -> NDArray[np.int64]:
    """Edges of cells of t that double in size away from both ends, where L_t changes fastest: [cells + 1]."""
    half = (num_timesteps + 1) // 2
    rising = [0]
    while rising[-1] < half:
        rising.append(min(half, max(1, 2 * rising[-1])))
    falling = [num_timesteps - edge for edge in rising if edge < num_timesteps - half]
    return np.unique(np.array(rising + falling, dtype=np.int64))


def replicates_for(num_calls: int) -> int:
    """Enough replicates for a usable standard error, few enough that each is still well stratified."""
    return 16 if num_calls >= 1024 else 8


def pilot_plan(num_timesteps: int, num_images: int, num_calls: int, *, seed: int) -> Plan:
    """Equally many calls in every cell of t, spread over it; weights are not used."""
    edges = cell_edges(num_timesteps)
    cells = len(edges) - 1
    per_cell = max(MIN_PILOT_PER_CELL, round(num_calls * PILOT_SHARE / cells))
    rng = generator(seed, Stream.NLL_PLAN, _PILOT_BLOCK)
    position = (np.arange(per_cell) + rng.random((cells, per_cell))) / per_cell  # stratified within each cell
    t = (edges[:-1, None] + position * np.diff(edges)[:, None]).astype(np.int64)
    t = np.minimum(t, edges[1:, None] - 1).ravel()
    # The pilot takes its images from the end of the same permutation, the estimate from its beginning.
    image = _images(num_images, len(t), seed=seed, from_end=True)
    replicate = np.zeros(len(t), dtype=np.int64)
    return Plan(image, t, np.ones(len(t)), replicate, noise_start=1 << 40, num_replicates=1)


def probabilities(pilot: Plan, terms: NDArray[np.float64], num_timesteps: int) -> NDArray[np.float64]:
    """p_t from the pilot's terms [calls]: root mean squares by cell, interpolated, with the uniform share: [T]."""
    edges = cell_edges(num_timesteps)
    cell = np.searchsorted(edges, pilot.t, side="right") - 1
    counts = np.bincount(cell, minlength=len(edges) - 1)
    mean_square = np.bincount(cell, weights=terms**2, minlength=len(edges) - 1) / counts
    log_rms = 0.5 * np.log(np.maximum(mean_square, 1e-30))
    centre = np.bincount(cell, weights=_stretched(pilot.t, num_timesteps), minlength=len(edges) - 1) / counts
    rms = np.exp(np.interp(_stretched(np.arange(num_timesteps), num_timesteps), centre, log_rms))
    p: NDArray[np.float64] = (1 - UNIFORM_SHARE) * rms / rms.sum() + UNIFORM_SHARE / num_timesteps
    return p


def _stretched(t: NDArray[np.int64], num_timesteps: int) -> NDArray[np.float64]:
    """t on a scale in which the doubling cells are equally wide."""
    t = t.astype(np.float64)
    return np.log((t + 1) / (num_timesteps - t))


def importance_plan(p: NDArray[np.float64], num_images: int, num_calls: int, *, seed: int) -> Plan:
    """A stratified plan of about `num_calls` calls for the distribution p [T] over timesteps.

    Raises:
        UserError: too few calls for replicates with a stratum of t = 0 in each.
    """
    check_num_calls(num_calls)
    replicates = replicates_for(num_calls)
    per_replicate = num_calls // replicates
    num_first = int(np.clip(round(p[0] * per_replicate), 1, per_replicate - 2))
    num_rest = per_replicate - num_first
    rest = p[1:] / p[1:].sum()
    cdf = np.cumsum(rest)
    rng = generator(seed, Stream.NLL_PLAN, _PLAN_BLOCK)
    # Latin in each replicate: one point in each of num_rest equal slices of the cumulative distribution.
    points = (np.arange(num_rest) + rng.random((replicates, num_rest))) / num_rest * cdf[-1]  # [R, num_rest]
    t_rest = 1 + np.minimum(np.searchsorted(cdf, points, side="right"), len(rest) - 1)
    t = np.concatenate([np.zeros((replicates, num_first), dtype=np.int64), t_rest], axis=1)  # [R, per_replicate]
    weight = np.concatenate(
        [np.full((replicates, num_first), 1 / num_first), 1 / (num_rest * rest[t_rest - 1])], axis=1
    )
    image = _images(num_images, t.size, seed=seed, from_end=False)
    replicate = np.repeat(np.arange(replicates), per_replicate)
    return Plan(image, t.ravel(), weight.ravel(), replicate, noise_start=0, num_replicates=replicates)


def exact_plan(num_timesteps: int, num_images_total: int, num_images: int, *, seed: int) -> Plan:
    """Every timestep of each of `num_images` images; a replicate is an image."""
    image = np.repeat(_images(num_images_total, num_images, seed=seed, from_end=False), num_timesteps)
    t = np.tile(np.arange(num_timesteps), num_images)
    replicate = np.repeat(np.arange(num_images), num_timesteps)
    return Plan(image, t, np.ones(len(t)), replicate, noise_start=0, num_replicates=num_images)


def check_num_calls(num_calls: int) -> None:
    """Raises UserError for a budget too small to say anything with an error bar."""
    if num_calls < MIN_CALLS:
        raise UserError(
            f"--num-calls {num_calls} is too few for an estimate with an error bar; use {MIN_CALLS} or more."
        )


def _images(num_images: int, count: int, *, seed: int, from_end: bool) -> NDArray[np.int64]:
    """`count` sample numbers: whole passes over the split, each in its own order, so that pairings never repeat."""
    passes = [
        generator(seed, Stream.NLL_PLAN, _IMAGE_BLOCK + number).permutation(num_images)
        for number in range(-(-count // num_images))
    ]
    return np.concatenate([order[::-1] if from_end else order for order in passes])[:count].astype(np.int64)
