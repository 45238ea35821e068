"""The likelihood estimate of a network: unbiased, exact where it says so, the same whoever makes it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nll_process import gaussian_denoiser, make_process

from data_pipeline.counter_rng import Stream, normal
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation.chunks import Chunks, Shard
from evaluation.nll.estimate import NllEstimate, estimate_nll
from evaluation.nll.plan import Plan
from evaluation.nll.settings import NllSettings
from evaluation.nll.summary import sampled_mean
from trainer.diffusion.gaussian import GaussianDiffusion

STEPS = 24


@pytest.fixture(scope="module")
def dataset(generated_data: Path) -> ShardDataset:
    return ShardDataset(generated_data / "test")


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return make_process(STEPS)


def estimate(process: GaussianDiffusion, dataset: ShardDataset, seed: int = 0, **settings: Any) -> NllEstimate:
    return estimate_nll(gaussian_denoiser(process), process, dataset, NllSettings(**settings), seed=seed)


@pytest.fixture(scope="module")
def sweep(process: GaussianDiffusion, dataset: ShardDataset) -> NllEstimate:
    """All timesteps of all images."""
    return estimate(process, dataset, mode="exact")


def noise_of(sweep: NllEstimate) -> float:
    """Standard error of a sweep's bound: its noise, which is no more than what differs between images, t by t."""
    bits = sweep.terms.bits.reshape(sweep.num_replicates, -1).astype(np.float64)
    return float(np.sqrt(bits.var(axis=0, ddof=1).sum() / sweep.num_replicates))


@pytest.mark.parametrize("mode", ["importance", "uniform"])
def test_sampled_estimates_agree_with_the_full_sweep(
    process: GaussianDiffusion, dataset: ShardDataset, sweep: NllEstimate, mode: str
) -> None:
    found = estimate(process, dataset, mode=mode, num_calls=2048)
    assert found.stderr is not None
    assert abs(found.bits_per_dim - sweep.bits_per_dim) < 4 * np.hypot(noise_of(sweep), found.stderr)
    assert 0 < found.stderr < 0.05 * sweep.bits_per_dim
    assert (found.num_pilot_calls == 0) == (mode == "uniform")


def test_a_respaced_chain_has_its_own_bound(dataset: ShardDataset, sweep: NllEstimate) -> None:
    chain = make_process(STEPS, "8")
    exact, found = (
        estimate(chain, dataset, mode=mode, num_calls=1024, respacing="8") for mode in ("exact", "importance")
    )
    assert found.stderr is not None
    assert abs(found.bits_per_dim - exact.bits_per_dim) < 4 * np.hypot(noise_of(exact), found.stderr)
    assert exact.bits_per_dim > sweep.bits_per_dim + 4 * noise_of(sweep)
    names = ("num_timesteps", "trained_timesteps", "respacing")
    assert [found.measured[name] for name in names] == [8, STEPS, "8"]
    assert [sweep.measured[name] for name in names] == [STEPS, STEPS, None]


def test_parts_add_up_and_details_are_json(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    for found in (estimate(process, dataset, num_calls=256), estimate(process, dataset, mode="exact", num_images=3)):
        assert found.bits_per_dim == pytest.approx(found.prior + found.middle + found.decoder, rel=1e-12)
        assert min(found.prior, found.middle, found.decoder) > 0
        assert found.stderr is not None
        assert found.interval95 is not None
        assert found.interval95[0] < found.bits_per_dim < found.interval95[1]
        details = json.loads(json.dumps(found.details()))
        assert details["decoder_stderr"] > 0
        assert details["interval95"] == list(found.interval95)
        assert "target_reached" not in details


def test_the_terms_are_those_of_the_process(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    found = estimate(process, dataset, mode="exact", num_images=2)
    noises = normal(0, Stream.NLL_NOISE, 0, len(found.plan), (3, 16, 16))
    for call in (0, 5, STEPS, 2 * STEPS - 1):
        images, labels = dataset.read(found.plan.image[call : call + 1])
        x0, noise = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(noises[call : call + 1])
        t = torch.from_numpy(found.plan.t[call : call + 1])
        x_t = process.q_sample(x0, t, noise)
        output = gaussian_denoiser(process)(labels)(x_t, process.network_time(t))
        prediction = process.predict(output, x_t, t, clip=True)
        expected = {
            "bits": process.vb_terms(prediction, x0, x_t, t),
            "prior": process.prior_bits(x0),
            "mse": ((prediction.eps - noise) ** 2).mean(),
            "xstart_mse": ((prediction.x0 - x0) ** 2).mean(),
        }
        for name, value in expected.items():
            assert getattr(found.terms, name)[call] == pytest.approx(float(value), rel=1e-5), name


def test_clipping_is_a_different_bound(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    clipped, bare = (estimate(process, dataset, num_calls=256, clip_denoised=clip) for clip in (True, False))
    assert clipped.bits_per_dim != bare.bits_per_dim
    assert (clipped.measured["clip_denoised"], bare.measured["clip_denoised"]) == (True, False)


def test_rounds_go_on_until_the_standard_error_is_reached(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    first = estimate(process, dataset, num_calls=1024)
    assert first.stderr is not None
    target = first.stderr / 1.3
    found = estimate(process, dataset, num_calls=50_000, target_stderr=target)
    assert found.stderr is not None
    assert found.stderr <= target
    assert found.num_rounds > 1
    # So many calls as the first round foretells, give or take what a standard error from 16 replicates is unsure.
    assert 1024 < len(found.plan) < 8 * 1024
    assert found.num_replicates == 16
    assert found.details()["target_reached"]
    easy = estimate(process, dataset, num_calls=50_000, target_stderr=1.0)
    assert (easy.num_rounds, len(easy.plan)) == (1, 1024)
    missed = estimate(process, dataset, num_calls=1500, target_stderr=1e-5)
    assert missed.num_rounds == 2
    assert 1480 < len(missed.plan) <= 1500
    assert not missed.details()["target_reached"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_calls": 10}, "--num-calls 10 "),
        ({"target_stderr": 0.0}, "--target-stderr 0"),
        ({"target_stderr": float("nan")}, "--target-stderr nan"),
        ({"target_stderr": 0.1, "mode": "exact"}, "--target-stderr"),
        ({"num_images": 0, "mode": "exact"}, "--num-images 0"),
        ({"num_images": 65, "mode": "exact"}, "--num-images 65: the split has 64 images"),
        ({"mode": "best"}, "--mode best"),
    ],
)
def test_settings_that_give_no_estimate_are_refused(
    dataset: ShardDataset, process: GaussianDiffusion, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        estimate(process, dataset, **settings)


def test_a_bound_that_is_not_finite_is_refused(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    def diverged(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, torch.nan)

    with pytest.raises(UserError, match="not finite at t="):
        estimate_nll(lambda _: diverged, process, dataset, NllSettings())


TARGET = NllSettings(num_calls=1160, target_stderr=1e-5)  # a pilot and two rounds


def in_folder(
    process: GaussianDiffusion, dataset: ShardDataset, chunks: Chunks, settings: NllSettings = TARGET, fail_at: int = -1
) -> NllEstimate:
    """An estimate that is interrupted at network call number `fail_at`."""
    calls, condition = itertools.count(), gaussian_denoiser(process)

    def interrupted(labels: Any) -> Any:
        if next(calls) == fail_at:
            raise KeyboardInterrupt
        return condition(labels)

    return estimate_nll(interrupted, process, dataset, settings, chunks=chunks)


def same(one: NllEstimate, other: NllEstimate) -> bool:
    return (one.total, one.parts) == (other.total, other.parts) and all(
        np.array_equal(getattr(one.terms, name), getattr(other.terms, name)) for name in ("bits", "mse", "xstart_mse")
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "settings", [NllSettings(num_calls=200), NllSettings(mode="exact", num_images=5)], ids=["sampled", "exact"]
)
def test_shards_in_any_order_give_the_same_bits_as_one_process(
    process: GaussianDiffusion, dataset: ShardDataset, tmp_path: Path, order: tuple[int, int], settings: NllSettings
) -> None:
    alone = in_folder(process, dataset, Chunks(), settings)
    for index in order:
        found = in_folder(process, dataset, Chunks(tmp_path, shard=Shard(index, 2), patience=0.01), settings)
        assert same(found, alone)


def test_an_interrupted_estimate_goes_on(process: GaussianDiffusion, dataset: ShardDataset, tmp_path: Path) -> None:
    alone = in_folder(process, dataset, Chunks())
    batches = -(-alone.num_calls // 64)
    for fail_at in (0, batches // 2, batches - 1):
        folder = tmp_path / str(fail_at)
        with pytest.raises(KeyboardInterrupt):
            in_folder(process, dataset, Chunks(folder), fail_at=fail_at)
        assert len(list(folder.rglob("*.npz"))) == fail_at
        assert same(in_folder(process, dataset, Chunks(folder)), alone)


def test_everything_can_be_recomputed_from_what_is_kept(
    dataset: ShardDataset, process: GaussianDiffusion, tmp_path: Path
) -> None:
    found = estimate(process, dataset, num_calls=1500, target_stderr=1e-5)
    found.write_artifacts(tmp_path)
    kept = dict(np.load(tmp_path / "nll.npz"))
    values = kept["weight"] * kept["bits"] + kept["prior"]
    assert values.mean() == pytest.approx(found.bits_per_dim, rel=1e-12)
    names = ("image", "t", "weight", "replicate", "round", "noise_start", "num_replicates")
    plan = Plan(*(kept[name].astype(np.float64 if name == "weight" else np.int64)[()] for name in names))
    assert sampled_mean(values, plan, len(dataset)) == found.total
    assert {int(kept["seed"]), int(kept["num_timesteps"])} == {0, STEPS}
    assert set(kept["round"]) == {0, 1}
    for name in ("nll_per_t.png", "rate_distortion.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert not (tmp_path / "vb_terms.npz").exists()  # an exact sweep's alone


def test_the_profile_adds_up_to_the_bound(
    dataset: ShardDataset, process: GaussianDiffusion, sweep: NllEstimate, tmp_path: Path
) -> None:
    exact, sampled = sweep, estimate(process, dataset, num_calls=2048)
    for found, folder in ((exact, tmp_path / "exact"), (sampled, tmp_path / "sampled")):
        found.write_artifacts(folder)
    every, cells = (dict(np.load(tmp_path / name / "nll_per_t.npz")) for name in ("exact", "sampled"))
    for profile, found in ((every, exact), (cells, sampled)):
        width = np.diff(profile["edges"])
        assert (profile["bits"] * width).sum() + profile["prior"] == pytest.approx(found.bits_per_dim, rel=1e-9)
        assert (np.diff(profile["rate"]) < 0).all()
        assert profile["distortion"] == pytest.approx(127.5 * np.sqrt(profile["xstart_mse"]))
    # All but the last step's bits are there when x_0's predecessor is known; none but the prior's at the beginning.
    assert every["rate"][0] == pytest.approx(exact.prior + exact.middle)
    assert every["rate"][-1] == pytest.approx(exact.prior)
    edges = cells["edges"]
    swept = np.add.reduceat(every["bits"], edges[:-1]) / np.diff(edges)
    bound = 4 * np.hypot(cells["bits_stderr"], np.add.reduceat(every["bits_stderr"], edges[:-1]) / np.diff(edges))
    assert (np.abs(cells["bits"] - swept) < bound).all()
    swept_mse = np.add.reduceat(every["mse"], edges[:-1]) / np.diff(edges)
    for cell, (start, stop) in enumerate(itertools.pairwise(edges)):
        there = (start <= sampled.plan.t) & (sampled.plan.t < stop)
        mse, weight = sampled.terms.mse[there], sampled.plan.weight[there]
        stderr = mse.std() * np.sqrt(np.square(weight).sum()) / weight.sum()
        assert abs(cells["mse"][cell] - swept_mse[cell]) < 4 * stderr


def test_an_exact_sweep_writes_prior_arts_files(
    dataset: ShardDataset, process: GaussianDiffusion, tmp_path: Path
) -> None:
    found = estimate(process, dataset, mode="exact", num_images=5)
    found.write_artifacts(tmp_path)
    for name, terms in (("vb", "bits"), ("mse", "mse"), ("xstart_mse", "xstart_mse")):
        with np.load(tmp_path / f"{name}_terms.npz") as file:
            assert file.files == ["arr_0"]
            stored = file["arr_0"]
        assert (stored.shape, stored.dtype) == ((STEPS,), np.float32)
        by_t = getattr(found.terms, terms).reshape(5, STEPS).mean(axis=0)
        assert stored == pytest.approx(by_t[::-1], rel=1e-5)  # the first is the last timestep's
