"""The likelihood estimate of a network: unbiased, exact where it says so, the same whoever makes it."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nll_process import gaussian_denoiser, make_process

from data_pipeline.counter_rng import Stream, normal
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation.chunks import Chunks, FinishedElsewhere, Shard
from evaluation.nll import plan as plans
from evaluation.nll import rounds
from evaluation.nll.estimate import NllEstimate, estimate_nll
from evaluation.nll.plan import Plan
from evaluation.nll.profile import sampled_profile, swept_profile
from evaluation.nll.rounds import Drawn
from evaluation.nll.settings import Mode, NllSettings
from evaluation.nll.summary import sampled_mean
from evaluation.nll.sweep import Sweep
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.thresholding import static

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
    assert isinstance(sweep.seen, Sweep)
    return float(np.sqrt(np.square(sweep.seen.bits_stderr_by_t).sum()))


def drawn(found: NllEstimate) -> Drawn:
    """The calls of a sampled estimate."""
    assert isinstance(found.seen, Drawn)
    return found.seen


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
    found = drawn(estimate(process, dataset, num_calls=128))
    plan, (terms,) = found.plan, found.terms
    noises = normal(0, Stream.NLL_NOISE, 0, len(plan), (3, 16, 16))
    for call in (0, 5, 70, len(plan) - 1):
        images, labels = dataset.read(plan.image[call : call + 1])
        expected = terms_of(process, images, labels, plan.t[call : call + 1], noises[call : call + 1])
        for name, value in expected.items():
            assert getattr(terms, name)[call] == pytest.approx(float(value), rel=1e-5), name


def test_a_sweeps_sums_are_those_of_the_process(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    found = estimate(process, dataset, mode="exact", num_images=3).seen
    assert isinstance(found, Sweep)
    noises = normal(0, Stream.NLL_NOISE, 0, 3 * STEPS, (3, 16, 16))
    images, labels = (x.repeat(STEPS, axis=0) for x in dataset.read(found.image))
    expected = terms_of(process, images, labels, np.tile(np.arange(STEPS), 3), noises)
    bits, prior, mse, xstart_mse = (x.double().numpy().reshape(3, STEPS) for x in expected.values())
    assert found.bits == pytest.approx(bits.sum(axis=1), rel=1e-5)
    assert found.prior == pytest.approx(prior[:, 0], rel=1e-5)
    assert found.decoder == pytest.approx(bits[:, 0], rel=1e-5)
    assert found.bits_by_t == pytest.approx(bits.mean(axis=0), rel=1e-5)
    assert found.bits_stderr_by_t == pytest.approx(bits.std(axis=0, ddof=1) / np.sqrt(3), rel=1e-3)
    assert found.mse_by_t == pytest.approx(mse.mean(axis=0), rel=1e-5)
    assert found.xstart_mse_by_t == pytest.approx(xstart_mse.mean(axis=0), rel=1e-5)


def terms_of(
    process: GaussianDiffusion, images: Any, labels: Any, steps: Any, noises: Any
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The four terms of calls, [n] each."""
    x0, noise, t = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(noises), torch.from_numpy(steps)
    x_t = process.q_sample(x0, t, noise)
    output = gaussian_denoiser(process)(labels)(x_t, process.network_time(t))
    prediction = process.predict(output, x_t, t, threshold=static)
    return {
        "bits": process.vb_terms(prediction, x0, x_t, t),
        "prior": process.prior_bits(x0),
        "mse": ((prediction.eps - noise) ** 2).flatten(1).mean(dim=1),
        "xstart_mse": ((prediction.x0 - x0) ** 2).flatten(1).mean(dim=1),
    }


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
    assert 1024 < len(drawn(found).plan) < 8 * 1024
    assert found.num_replicates == 16
    assert found.details()["target_reached"]
    easy = estimate(process, dataset, num_calls=50_000, target_stderr=1.0)
    assert (easy.num_rounds, len(drawn(easy).plan)) == (1, 1024)
    assert easy.num_pilot_calls == pytest.approx(1024 / 8, abs=16)  # of the first round, not of the budget
    missed = estimate(process, dataset, num_calls=1500, target_stderr=1e-5)
    assert missed.num_rounds == 2
    assert 1480 < len(drawn(missed).plan) <= 1500
    assert not missed.details()["target_reached"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_calls": 10}, "--num-calls 10 "),
        ({"num_calls": 10**11}, "--num-calls 100000000000 is too many"),
        ({"num_images": 3}, "--num-images 3"),
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


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "FIRST_ROUND", 128)


TARGET = NllSettings(num_calls=256, target_stderr=1e-5)  # a pilot and two rounds, with the fixture


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
    arrays = [
        [x.seen.bits, x.seen.bits_by_t, x.seen.mse_by_t, x.seen.xstart_mse_by_t]
        if isinstance(x.seen, Sweep)
        else [getattr(x.seen.terms[0], name) for name in ("bits", "mse", "xstart_mse")]
        for x in (one, other)
    ]
    return (one.total, one.parts) == (other.total, other.parts) and all(map(np.array_equal, *arrays))


@pytest.mark.parametrize(
    "settings", [NllSettings(num_calls=128), NllSettings(mode="exact", num_images=3)], ids=["sampled", "exact"]
)
def test_shards_in_any_order_give_the_same_bits_as_one_process(
    process: GaussianDiffusion, dataset: ShardDataset, tmp_path: Path, settings: NllSettings
) -> None:
    alone = in_folder(process, dataset, Chunks(), settings)
    for order in ((0, 1), (1, 0)):
        for index in order:
            chunks = Chunks(tmp_path / str(order), shard=Shard(index, 2), patience=0.01)
            assert same(in_folder(process, dataset, chunks, settings), alone)


@pytest.mark.parametrize(
    ("settings", "leaves"),
    [
        (NllSettings(num_calls=128), True),
        (NllSettings(num_calls=128, target_stderr=1e-5), True),  # the budget ends with its first round
        (NllSettings(num_calls=256, target_stderr=2.0), False),  # only its standard error tells that it was the last
        (NllSettings(mode="exact", num_images=2), True),
    ],
)
@pytest.mark.usefixtures("small_rounds")
def test_only_the_first_process_sums_up_what_ends_the_job(
    process: GaussianDiffusion, dataset: ShardDataset, tmp_path: Path, settings: NllSettings, leaves: bool
) -> None:
    condition = gaussian_denoiser(process)
    shared = [Chunks(tmp_path, shard=Shard(index, 2), patience=0.01) for index in (0, 1)]
    first = estimate_nll(condition, process, dataset, settings, chunks=shared[0], final=True)
    assert first.num_rounds == 1
    with pytest.raises(FinishedElsewhere) if leaves else nullcontext():
        assert same(estimate_nll(condition, process, dataset, settings, chunks=shared[1], final=True), first)


@pytest.mark.parametrize("mode", ["importance", "uniform", "exact"])
def test_chunks_of_another_plan_are_not_used(
    process: GaussianDiffusion, dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    settings = NllSettings(mode=mode, num_calls=128, num_images=2 if mode == "exact" else None)

    def of_seed(chunks: Chunks, seed: int) -> NllEstimate:
        return estimate_nll(gaussian_denoiser(process), process, dataset, settings, seed=seed, chunks=chunks)

    of_seed(Chunks(tmp_path), 0)
    assert same(of_seed(Chunks(tmp_path), 1), of_seed(Chunks(), 1))
    monkeypatch.setattr(plans, "UNIFORM_SHARE", 0.9)
    assert same(of_seed(Chunks(tmp_path), 0), of_seed(Chunks(), 0))


@pytest.mark.parametrize("mode", ["importance", "exact"])
def test_a_chain_of_one_step_is_its_decoders_term(dataset: ShardDataset, tmp_path: Path, mode: str) -> None:
    chain = make_process(STEPS, "1")
    found = estimate(chain, dataset, mode=mode, num_calls=128, respacing="1")
    assert (found.middle, found.measured["num_timesteps"]) == (0, 1)
    assert found.decoder > 0
    found.write_artifacts(tmp_path)
    with np.load(tmp_path / "nll_per_t.npz") as file:
        assert file["bits"] == pytest.approx([found.decoder])


@pytest.mark.usefixtures("small_rounds")
def test_an_interrupted_estimate_goes_on(process: GaussianDiffusion, dataset: ShardDataset, tmp_path: Path) -> None:
    alone = in_folder(process, dataset, Chunks())
    assert alone.num_rounds == 2
    batches = -(-alone.num_calls // 64)
    for fail_at in (0, batches // 2, batches - 1):
        folder = tmp_path / str(fail_at)
        with pytest.raises(KeyboardInterrupt):
            in_folder(process, dataset, Chunks(folder), fail_at=fail_at)
        assert len(list(folder.rglob("*.npz"))) == fail_at
        assert same(in_folder(process, dataset, Chunks(folder)), alone)


@pytest.mark.usefixtures("small_rounds")
def test_everything_can_be_recomputed_from_what_is_kept(
    dataset: ShardDataset, process: GaussianDiffusion, tmp_path: Path
) -> None:
    found = estimate_nll(gaussian_denoiser(process), process, dataset, TARGET)
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
    dataset: ShardDataset, process: GaussianDiffusion, sweep: NllEstimate
) -> None:
    exact, sampled = sweep, estimate(process, dataset, num_calls=2048)
    assert isinstance(exact.seen, Sweep)
    calls = drawn(sampled)
    every = swept_profile(exact.seen).arrays()
    cells = sampled_profile(calls.plan, calls.terms[0], STEPS).arrays()
    for profile, found in ((every, exact), (cells, sampled)):
        width = np.diff(profile["edges"])
        assert (profile["bits"] * width).sum() + profile["prior"] == pytest.approx(found.bits_per_dim, rel=1e-9)
        assert (np.diff(profile["rate"]) < 0).all()
        assert profile["distortion"] == pytest.approx(127.5 * np.sqrt(profile["xstart_mse"]))
    # All but the last step's bits are there when x_0's predecessor is known; none but the prior's at the beginning.
    assert every["rate"][0] == pytest.approx(exact.prior + exact.middle)
    assert every["rate"][-1] == pytest.approx(exact.prior)
    edges = cells["edges"].astype(np.int64)
    swept = np.add.reduceat(every["bits"], edges[:-1]) / np.diff(edges)
    bound = 4 * np.hypot(cells["bits_stderr"], np.add.reduceat(every["bits_stderr"], edges[:-1]) / np.diff(edges))
    assert (np.abs(cells["bits"] - swept) < bound).all()
    swept_mse = np.add.reduceat(every["mse"], edges[:-1]) / np.diff(edges)
    for cell, (start, stop) in enumerate(itertools.pairwise(edges)):
        there = (start <= calls.plan.t) & (calls.plan.t < stop)
        mse, weight = calls.terms[0].mse[there], calls.plan.weight[there]
        stderr = mse.std() * np.sqrt(np.square(weight).sum()) / weight.sum()
        assert abs(cells["mse"][cell] - swept_mse[cell]) < 4 * stderr


def test_an_exact_sweep_writes_prior_arts_files(
    dataset: ShardDataset, process: GaussianDiffusion, tmp_path: Path
) -> None:
    found = estimate(process, dataset, mode="exact", num_images=5)
    found.write_artifacts(tmp_path)
    assert isinstance(found.seen, Sweep)
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(tmp_path / f"{name}_terms.npz") as file:
            assert file.files == ["arr_0"]
            stored = file["arr_0"]
        assert (stored.shape, stored.dtype) == ((STEPS,), np.float32)
        by_t = getattr(found.seen, {"vb": "bits"}.get(name, name) + "_by_t")
        assert stored == pytest.approx(by_t[::-1], rel=1e-5)  # the first is the last timestep's
    with np.load(tmp_path / "nll.npz") as file:
        assert (file["bits"] + file["prior"]).mean() == pytest.approx(found.bits_per_dim, rel=1e-12)
        assert file["image"].tolist() == found.seen.image.tolist()
