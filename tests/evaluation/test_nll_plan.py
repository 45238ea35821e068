"""Plans of the likelihood estimate, and their statistics: error bars that say what they mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.nll import Table, calibrate
from evaluation.nll.plan import (
    Plan,
    cell_edges,
    joined,
    pilot_plan,
    probabilities,
    replicates_for,
    round_plan,
    sweep_images,
    sweep_plan,
)
from evaluation.nll.settings import NllSettings
from evaluation.nll.summary import exact_mean, sampled_mean


def flat_plan(num_images: int, num_calls: int, seed: int = 0, num_timesteps: int = 100) -> Plan:
    p = np.full(num_timesteps, 1 / num_timesteps)
    return round_plan(p, num_images, num_calls, replicates_for(num_calls), seed=seed)


def test_importance_sampling_beats_uniform_draws() -> None:
    """Spread of a replicate's sum with p from a pilot, against uniform p, over the exact terms of one sweep."""
    sweep = np.array([3.0 / (t + 1) for t in range(1000)])  # a profile as steep as real ones
    pilot = pilot_plan(1000, 5000, 1024, seed=0)
    spreads = []
    for p in (probabilities(pilot, [sweep[pilot.t]], 1000), np.full(1000, 1e-3)):
        plan = round_plan(p, 5000, 1024, 16, seed=1)
        noisy = sweep[plan.t] * np.exp(0.3 * np.random.default_rng(2).standard_normal(len(plan)))
        spreads.append(np.bincount(plan.replicate, weights=plan.weight * noisy).std(ddof=1))
    assert spreads[0] < spreads[1] / 3


def test_a_plan_is_stratified_and_its_weights_integrate_to_the_sum() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(100) + 0.05
    p /= p.sum()
    plan = round_plan(p, 1000, 4096, 16, seed=3)
    terms = (1.0 + np.cos(np.arange(100) / 7)) ** 2
    assert (plan.weight * terms[plan.t]).mean() == pytest.approx(terms.sum(), rel=0.01)
    counts = np.bincount(plan.t, minlength=100) / len(plan)
    assert np.abs(counts - p).max() < 0.01
    # Each replicate looks at t = 0 equally often: a stratum of its own.
    first = [int((plan.t[plan.replicate == r] == 0).sum()) for r in range(plan.num_replicates)]
    assert len(set(first)) == 1


def test_pooled_squares_of_several_pilots() -> None:
    pilot = pilot_plan(100, 500, 1024, seed=0)
    one, other = np.exp(-pilot.t / 20), np.exp(-pilot.t / 5)
    pooled = probabilities(pilot, [one, other], 100)
    alone = probabilities(pilot, [np.sqrt((one**2 + other**2) / 2)], 100)
    assert pooled == pytest.approx(alone, rel=1e-12)


def test_the_pilot_uses_other_images_and_noise_than_the_estimate() -> None:
    pilot = pilot_plan(100, 10_000, 1024, seed=0)
    plan = flat_plan(10_000, 1024)
    assert not set(pilot.image) & set(plan.image)
    assert pilot.noise_start >= len(plan)
    found = probabilities(pilot, [np.exp(-pilot.t / 20)], 100)
    assert found.sum() == pytest.approx(1.0)
    assert found.min() >= 0.1 / 100
    assert found[0] > 5 * found[80]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 4000])
def test_cells_cover_all_timesteps_and_are_fine_at_both_ends(steps: int) -> None:
    edges = cell_edges(steps)
    assert (edges[0], edges[-1]) == (0, steps)
    assert (np.diff(edges) > 0).all()
    assert edges[1] == 1
    assert steps < 4 or edges[-2] == steps - 1


def test_a_sweep_looks_at_every_timestep_of_different_images() -> None:
    images = sweep_images(50, 30, seed=0)
    assert len(set(images)) == 30
    assert images[:3].tolist() == sweep_images(50, 3, seed=0).tolist()
    plan = sweep_plan(7, 10, noise_start=20)
    assert (set(plan.image), plan.t.tolist(), plan.noise_start) == ({7}, list(range(10)), 20)


def test_a_part_of_a_plan_keeps_its_noises() -> None:
    plan = flat_plan(100, 256)
    part = plan.part(slice(64, 128))
    assert part.noise_start == 64
    assert part.t.tolist() == plan.t[64:128].tolist()


@pytest.mark.parametrize(
    ("num_images", "num_calls"), [(10_000, 1024), (1000, 1024), (300, 256), (100, 1024), (16, 512)]
)
def test_images_are_looked_at_equally_often_and_some_by_two_replicates(num_images: int, num_calls: int) -> None:
    plan = flat_plan(num_images, num_calls)
    image, visits = np.unique(plan.image, return_counts=True)
    assert visits.max() - visits.min() <= 1
    seen_by = [len(set(plan.replicate[plan.image == i])) for i in image[visits > 1]]
    assert sum(visits[visits > 1] - 1) >= num_calls / 8
    assert min(seen_by) > 1
    per_replicate = np.bincount(plan.replicate)
    assert per_replicate.min() == per_replicate.max()


def test_later_rounds_go_on_with_images_and_noises() -> None:
    p = np.full(100, 0.01)
    first = round_plan(p, 10_000, 1024, 16, seed=0)
    second = round_plan(p, 10_000, 2048, 16, seed=0, earlier=[first])
    assert not set(first.image) & set(second.image)
    assert second.noise_start == len(first)
    assert not np.array_equal(first.t, second.t[: len(first)])
    whole = joined([first, second])
    assert len(whole) == 3072
    assert set(whole.round) == {0, 1}
    assert np.bincount(whole.replicate).tolist() == [192] * 16


@dataclass(frozen=True)
class Simulated:
    """Means over many plans, with their standard errors."""

    error: float  # mean square of the estimate's error
    error_stderr: float
    said: float  # mean of stderr^2
    said_stderr: float
    time_noise: float
    time_noise_stderr: float
    images: float
    images_stderr: float


def simulate(f: NDArray[np.float64], noise: float, num_calls: int, num_plans: int) -> Simulated:
    """Values f[image] + noise, where the components are known."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(num_plans):
        plan = flat_plan(len(f), num_calls, seed)
        found = sampled_mean(f[plan.image] + noise * rng.standard_normal(len(plan)), plan, len(f))
        assert found.stderr is not None
        assert found.stderr_time_noise is not None
        assert found.stderr_images is not None
        assert found.stderr**2 == pytest.approx(found.stderr_time_noise**2 + found.stderr_images**2)
        rows.append(
            [(found.value - f.mean()) ** 2, found.stderr**2, found.stderr_time_noise**2, found.stderr_images**2]
        )
    mean, stderr = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(num_plans)
    return Simulated(*(x for pair in zip(mean, stderr, strict=True) for x in pair))


@pytest.mark.parametrize(("num_images", "num_calls"), [(20_000, 2048), (2400, 2048), (500, 2048), (16, 1024)])
def test_the_parts_of_the_standard_error_are_unbiased(num_images: int, num_calls: int) -> None:
    f = np.random.default_rng(1).standard_normal(num_images)
    found = simulate(f, noise=1.5, num_calls=num_calls, num_plans=300)
    assert abs(found.error - found.said) < 4 * np.hypot(found.error_stderr, found.said_stderr)
    assert abs(found.time_noise - 1.5**2 / num_calls) < 4 * found.time_noise_stderr
    shares = np.bincount(flat_plan(num_images, num_calls).image, minlength=num_images) / num_calls
    images = f.var(ddof=1) * np.square(shares - 1 / num_images).sum()
    assert abs(found.images - images) <= 4 * found.images_stderr
    if num_calls % num_images == 0:
        assert (images, found.images) == (0, 0)


def test_the_populations_error_is_that_of_other_images_too() -> None:
    """Images are drawn anew for every plan, from a population of mean 0."""
    rng, values, said = np.random.default_rng(2), [], []
    for seed in range(300):
        f = rng.standard_normal(100)
        plan = flat_plan(100, 1024, seed)
        found = sampled_mean(f[plan.image] + rng.standard_normal(len(plan)), plan, 100)
        assert found.stderr is not None
        assert found.stderr_population is not None
        assert found.stderr_population > found.stderr
        values.append(found.value**2)
        said.append(found.stderr_population**2)
    assert abs(np.mean(values) - np.mean(said)) < 4 * np.std(values) / np.sqrt(len(values))


def test_an_exact_sweeps_error_shrinks_as_the_split_is_used_up() -> None:
    rng = np.random.default_rng(3)
    f = 4 + rng.standard_normal(40)
    errors, said = [], []
    for seed in range(400):
        found = exact_mean(f[sweep_images(40, 30, seed=seed)], 40)
        assert found.stderr is not None
        errors.append((found.value - f.mean()) ** 2)
        said.append(found.stderr**2)
    # Variance of the mean of 30 of 40 without replacement: S^2 (1/30 - 1/40).
    assert np.mean(said) == pytest.approx(f.var(ddof=1) * (1 / 30 - 1 / 40), rel=0.02)
    assert abs(np.mean(errors) - np.mean(said)) < 4 * np.std(errors) / np.sqrt(len(errors))
    complete = exact_mean(f, 40)
    assert complete.value == pytest.approx(f.mean())
    assert (complete.stderr, complete.stderr_images) == (None, 0)
    assert exact_mean(f[:1], 40).stderr is None


def make_table(num_images: int, between_images: float, between_noises: float) -> Table:
    """Terms of T = 100 steps as steep as real ones, log-normal around the profile."""
    rng = np.random.default_rng(0)
    profile = 3.0 / (np.arange(100) + 1)
    image = np.exp(between_images * rng.standard_normal((num_images, 1, 1)))
    terms = np.exp(between_noises * rng.standard_normal((num_images, 100, 2)))
    return Table((profile[None, :, None] * image * terms).astype(np.float32), np.full(num_images, 0.01, np.float32))


@pytest.mark.parametrize(
    ("num_images", "between_images", "num_calls"),
    [(16, 0.2, 1024), (2000, 0.2, 512), (1000, 0.15, 1024)],
    ids=["few images", "large split", "about as many images as calls"],
)
def test_intervals_cover(num_images: int, between_images: float, num_calls: int) -> None:
    table = make_table(num_images, between_images, between_noises=0.3)
    found = calibrate(table, NllSettings(num_calls=num_calls), 1000)
    assert 0.93 <= found.coverage <= 0.97
    assert abs(found.bias_in_stderrs) < 4
    assert found.mean_stderr == pytest.approx(found.deviation, rel=0.1)
