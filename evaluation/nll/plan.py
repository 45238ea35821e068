"""Which (image, timestep, noise) a likelihood estimate looks at, and with what weight.

The bound is a sum over T timesteps, L_vlb = L_T + sum_t L_t. One network call sees one L_t of one image; drawn with
probability p_t it enters as L_t / p_t, unbiased for every p > 0 and of least variance for p_t proportional to
sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, section 3.3, there for training). Here p comes from a pilot on other images
and noise, so that it is fixed before the estimate; a share of uniform draws keeps every weight bounded; t = 0, the
decoder's term, is a stratum of its own; the other draws are stratified through p's cumulative distribution. The
standard error comes from independent replicates, since the formula for independent draws would overstate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.counter_rng import Stream, generator

UNIFORM_SHARE = 0.1  # defensive mixture
PILOT_SHARE = 1 / 8  # of the first round's calls
MAX_PILOT = 512  # more would hardly change p
MIN_PILOT_PER_CELL = 2
# Of a round's calls, so many come back to an image of the same round, in another replicate: without such pairs nothing
# would tell images apart from noise. Where the split has images enough, a share q makes the variance that images bring
# 1 + 2q times as large. In trained networks that is about half of the whole, so an eighth costs 6 % of the standard
# error; it gives a round of 2,048 calls 256 pairs, and S^2 to about a sixth.
SECOND_VISITS = 1 / 8
PILOT_NOISE = 1 << 40  # number of the pilot's first noise, beyond all of the estimate's

_PILOT_BLOCK, _ROUND_BLOCK, _IMAGE_BLOCK = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """Calls of an estimate, all arrays [num_calls]. It is the mean over calls of weight * L_t + L_T.

    Call i's noise is number noise_start + i of the noise stream.
    """

    image: NDArray[np.int64]  # sample number in the data split
    t: NDArray[np.int64]
    weight: NDArray[np.float64]
    replicate: NDArray[np.int64]
    round: NDArray[np.int64]
    noise_start: int
    num_replicates: int

    def __len__(self) -> int:
        return len(self.t)

    def part(self, calls: slice) -> Plan:
        """Some of the calls, with the noises that are theirs."""
        names = ("image", "t", "weight", "replicate", "round")
        return replace(
            self, **{name: getattr(self, name)[calls] for name in names}, noise_start=self.noise_start + calls.start
        )


def joined(rounds: Sequence[Plan]) -> Plan:
    """The rounds of an estimate as one plan: a replicate goes on from round to round."""
    image, t, weight, replicate, number = (
        np.concatenate([getattr(plan, name) for plan in rounds])
        for name in ("image", "t", "weight", "replicate", "round")
    )
    return Plan(image, t, weight, replicate, number, rounds[0].noise_start, rounds[0].num_replicates)


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
    """Equally many calls in every cell of t, spread over it, for a first round of `num_calls`; without weights."""
    edges = cell_edges(num_timesteps)
    cells = len(edges) - 1
    per_cell = max(MIN_PILOT_PER_CELL, round(min(num_calls * PILOT_SHARE, MAX_PILOT) / cells))
    rng = generator(seed, Stream.NLL_PLAN, _PILOT_BLOCK)
    position = (np.arange(per_cell) + rng.random((cells, per_cell))) / per_cell  # stratified within each cell
    t = (edges[:-1, None] + position * np.diff(edges)[:, None]).astype(np.int64)
    t = np.minimum(t, edges[1:, None] - 1).ravel()
    # The pilot takes its images from the end of the permutation whose beginning the estimate takes.
    order = rng.permuted(_image_order(num_images, seed)[::-1][: len(t)])
    zeros = np.zeros(len(t), dtype=np.int64)
    return Plan(np.resize(order, len(t)), t, np.ones(len(t)), zeros, zeros, PILOT_NOISE, num_replicates=1)


def probabilities(
    pilot: Plan, terms: Sequence[NDArray[Any]], num_timesteps: int
) -> NDArray[np.float64]:  # fmt: skip
    """p_t [T] from the pilot's terms, one array [calls] a network, whose squares are pooled.

    Root mean squares by cell, interpolated, with the uniform share.
    """
    edges = cell_edges(num_timesteps)
    cell = np.searchsorted(edges, pilot.t, side="right") - 1
    counts = np.bincount(cell, minlength=len(edges) - 1)
    squares = np.mean([np.square(bits, dtype=np.float64) for bits in terms], axis=0)
    mean_square = np.bincount(cell, weights=squares, minlength=len(edges) - 1) / counts
    log_rms = 0.5 * np.log(np.maximum(mean_square, 1e-30))
    centre = np.bincount(cell, weights=_stretched(pilot.t, num_timesteps), minlength=len(edges) - 1) / counts
    rms = np.exp(np.interp(_stretched(np.arange(num_timesteps), num_timesteps), centre, log_rms))
    p: NDArray[np.float64] = (1 - UNIFORM_SHARE) * rms / rms.sum() + UNIFORM_SHARE / num_timesteps
    return p


def _stretched(t: NDArray[np.int64], num_timesteps: int) -> NDArray[np.float64]:
    """t on a scale in which the doubling cells are equally wide."""
    t = t.astype(np.float64)
    return np.log((t + 1) / (num_timesteps - t))


def round_plan(
    p: NDArray[np.float64], num_images: int, num_calls: int, num_replicates: int, *, seed: int,
    earlier: Sequence[Plan] = (),
) -> Plan:  # fmt: skip
    """The next round: about `num_calls` calls, stratified for the distribution p [T] over timesteps.

    `earlier`: the rounds before it. Its images are those after theirs, in the split's one random order.
    """
    number, done = len(earlier), sum(len(plan) for plan in earlier)
    per_replicate = num_calls // num_replicates
    shape = (num_replicates, per_replicate)
    num_first = int(np.clip(round(p[0] * per_replicate), 1, per_replicate - 2))
    if len(p) == 1:  # a chain of one step: the decoder's term is all there is
        num_first = per_replicate
    num_rest = per_replicate - num_first
    rest = p[1:] / p[1:].sum()
    cdf = np.cumsum(rest)
    rng = generator(seed, Stream.NLL_PLAN, _ROUND_BLOCK, part=number)
    # Latin in each replicate: one point in each of num_rest equal slices of the cumulative distribution.
    points = (np.arange(num_rest) + rng.random((num_replicates, num_rest))) / num_rest  # [R, num_rest]
    t, weight = np.zeros(shape, dtype=np.int64), np.full(shape, per_replicate / num_first)
    t[:, num_first:] = 1 + np.minimum(np.searchsorted(cdf, points, side="right"), len(rest) - 1)
    weight[:, num_first:] = per_replicate / (num_rest * rest[t[:, num_first:] - 1])
    visits = _visits(num_images, shape, start=sum(_num_distinct(num_images, len(plan)) for plan in earlier))
    image = rng.permuted(_image_order(num_images, seed)[visits], axis=1)  # independent of t in every replicate
    replicate = np.broadcast_to(np.arange(num_replicates)[:, None], shape)
    # By columns: calls at t = 0 come first and neighbours have similar t, so few chunks pay for the decoder's term.
    return Plan(
        image.T.ravel(), t.T.ravel(), weight.T.ravel(), replicate.T.ravel(), np.full(t.size, number),
        noise_start=done, num_replicates=num_replicates,
    )  # fmt: skip


def _num_distinct(num_images: int, num_calls: int) -> int:
    return min(num_images, num_calls - int(SECOND_VISITS * num_calls))


def _visits(num_images: int, shape: tuple[int, int], start: int) -> NDArray[np.int64]:
    """Which places of the split's order each replicate visits: [R, calls a replicate].

    The round's places lie on a circle; a replicate walks along it, and each starts one R-th further on. So all places
    are visited equally often, up to one visit, by each replicate and by all together, and some by several. The more
    calls there are to an image, the more images have neighbouring replicates in common: what differs between those is
    time and noise.
    """
    replicates, per_replicate = shape
    distinct = _num_distinct(num_images, replicates * per_replicate)
    first = np.arange(replicates) * distinct // replicates
    visits: NDArray[np.int64] = (start + (first[:, None] + np.arange(per_replicate)) % distinct) % num_images
    return visits


def sweep_images(num_images_total: int, num_images: int, *, seed: int) -> NDArray[np.int64]:
    """The images of an exact sweep, in its order: [num_images]."""
    return _image_order(num_images_total, seed)[:num_images]


def sweep_plan(image: int, num_timesteps: int, *, noise_start: int) -> Plan:
    """Every timestep of one image, from t = 0 up."""
    zeros = np.zeros(num_timesteps, dtype=np.int64)
    weight = np.full(num_timesteps, float(num_timesteps))
    return Plan(zeros + image, np.arange(num_timesteps), weight, zeros, zeros, noise_start, num_replicates=1)


def _image_order(num_images: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, Stream.NLL_PLAN, _IMAGE_BLOCK).permutation(num_images)
