"""The likelihood estimate: unbiased, with error bars that cover, and exact where it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_stage import make_export, make_stage
from ranks import ROOT, run_ranks
from scipy import stats

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation.evaluate import EvalRequest, evaluate, main, result_path, write_records
from evaluation.nll.estimate import estimate_nll
from evaluation.nll.plan import cell_edges, exact_plan, importance_plan, pilot_plan, probabilities
from trainer.checkpoint import verify
from trainer.config import DiffusionConfig, SamplingConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.export import Export, open_export
from trainer.tracking.records import read_eval_records

STEPS = 60


@pytest.fixture(scope="module")
def dataset(generated_data: Path) -> ShardDataset:
    return ShardDataset(generated_data / "test")


@pytest.fixture(scope="module")
def process() -> GaussianDiffusion:
    return GaussianDiffusion.create(DiffusionConfig(num_timesteps=STEPS, variance="fixed_large", objective="simple"))


def gaussian_denoiser(process: GaussianDiffusion) -> Denoiser:
    """Exact for data with standard deviation 0.5: a cheap network with a realistic profile of L_t."""

    def denoise(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        t = (time * STEPS / 1000).round().long()
        alpha, sigma = process.signal_and_noise(t, x)
        return sigma * x / (alpha**2 * 0.25 + sigma**2)

    return denoise


@pytest.fixture(scope="module")
def truth(dataset: ShardDataset, process: GaussianDiffusion) -> tuple[float, float]:
    """All timesteps of all images, averaged over several noises: mean and its standard error."""
    denoise = gaussian_denoiser(process)
    values = [
        estimate_nll(lambda _: denoise, process, dataset, mode="exact", num_images=len(dataset), seed=seed).bits_per_dim
        for seed in range(10)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_importance_sampling_is_unbiased_and_its_error_bars_cover(
    dataset: ShardDataset, process: GaussianDiffusion, truth: tuple[float, float]
) -> None:
    denoise = gaussian_denoiser(process)
    found = [estimate_nll(lambda _: denoise, process, dataset, num_calls=256, seed=seed + 100) for seed in range(150)]
    values, errors = np.array([f.bits_per_dim for f in found]), np.array([f.stderr for f in found], dtype=float)
    mean, error = truth
    assert values.mean() == pytest.approx(mean, abs=4 * np.hypot(error, values.std() / np.sqrt(len(values))))
    quantile = stats.t.ppf(0.975, found[0].num_replicates - 1)
    covered = np.mean(np.abs(values - mean) < quantile * errors)
    assert 0.90 <= covered <= 0.99


def test_importance_sampling_beats_uniform_draws(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    """Spread of a replicate's sum with p from a pilot, against uniform p, over the exact terms of one sweep."""
    sweep = np.array([3.0 / (t + 1) for t in range(1000)])  # a profile as steep as real ones
    pilot = pilot_plan(1000, 5000, 1024, seed=0)
    spreads = []
    for p in (probabilities(pilot, sweep[pilot.t], 1000), np.full(1000, 1e-3)):
        plan = importance_plan(p, 5000, 1024, seed=1)
        noisy = sweep[plan.t] * np.exp(0.3 * np.random.default_rng(2).standard_normal(len(plan)))
        spreads.append(np.bincount(plan.replicate, weights=plan.weight * noisy).std(ddof=1))
    assert spreads[0] < spreads[1] / 3


def test_parts_add_up(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    denoise = gaussian_denoiser(process)
    found = estimate_nll(lambda _: denoise, process, dataset, num_calls=256)
    assert found.bits_per_dim == pytest.approx(found.prior + found.middle + found.decoder, rel=1e-12)
    assert min(found.prior, found.middle, found.decoder) > 0


def test_plan_is_stratified_and_its_weights_integrate_to_the_sum() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(100) + 0.05
    p /= p.sum()
    plan = importance_plan(p, num_images=1000, num_calls=4096, seed=3)
    terms = (1.0 + np.cos(np.arange(100) / 7)) ** 2
    weighted = plan.weight * terms[plan.t]
    sums = np.bincount(plan.replicate, weights=weighted)
    assert sums.mean() == pytest.approx(terms.sum(), rel=0.01)
    counts = np.bincount(plan.t, minlength=100) / len(plan)
    assert np.abs(counts - p).max() < 0.01
    # Each replicate looks at t = 0 equally often: a stratum of its own.
    first = [int((plan.t[plan.replicate == r] == 0).sum()) for r in range(plan.num_replicates)]
    assert len(set(first)) == 1


def test_pilot_uses_other_images_and_noise_than_the_estimate() -> None:
    pilot = pilot_plan(100, 10_000, 1024, seed=0)
    plan = importance_plan(np.full(100, 0.01), 10_000, 1024, seed=0)
    assert not set(pilot.image) & set(plan.image)
    assert pilot.noise_start >= len(plan)
    found = probabilities(pilot, np.exp(-pilot.t / 20), 100)
    assert found.sum() == pytest.approx(1.0)
    assert found.min() >= 0.1 / 100
    assert found[0] > 5 * found[80]


@pytest.mark.parametrize("steps", [2, 3, 10, 100, 4000])
def test_cells_cover_all_timesteps_and_are_fine_at_both_ends(steps: int) -> None:
    edges = cell_edges(steps)
    assert (edges[0], edges[-1]) == (0, steps)
    assert (np.diff(edges) > 0).all()
    assert edges[1] == 1
    assert steps < 4 or edges[-2] == steps - 1


def test_exact_plan_sweeps_everything_once() -> None:
    plan = exact_plan(10, 50, 3, seed=0)
    pairs: NDArray[np.int64] = np.stack([plan.image, plan.t])
    assert len(np.unique(pairs, axis=1).T) == 30


def test_too_few_calls_are_refused(dataset: ShardDataset, process: GaussianDiffusion) -> None:
    with pytest.raises(UserError, match="num-calls 10"):
        estimate_nll(lambda _: gaussian_denoiser(process), process, dataset, num_calls=10)


@pytest.fixture(scope="module")
def export(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    run_ranks(["trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}"], 1)
    return folder / "exports" / "000000000048"


def test_a_trained_networks_importance_estimate_agrees_with_the_full_sweep(export: Path, generated_data: Path) -> None:
    data = generated_data / "test"
    (exact,) = evaluate(export, EvalRequest(data=data, nll_mode="exact", num_images=16), progress=False)
    (ours,) = evaluate(export, EvalRequest(data=data, num_calls=2048), progress=False)
    assert exact.stderr is not None
    assert ours.stderr is not None
    assert abs(ours.value - exact.value) < 4 * (ours.stderr + exact.stderr)
    again = evaluate(export, EvalRequest(data=data, num_calls=2048), progress=False)[0]
    assert (again.value, again.stderr) == (ours.value, ours.stderr)
    model = evaluate(export, EvalRequest(data=data, num_calls=2048, weights="model"), progress=False)[0]
    assert model.weights != ours.weights
    assert model.value != ours.value


def test_keys_name_what_was_measured(export: Path, generated_data: Path) -> None:
    opened, test = open_export(export), generated_data / "test"
    request = EvalRequest(data=test, num_calls=256)
    path = result_path(opened, request)
    assert path == result_path(opened, EvalRequest(data=test, num_calls=256, num_threads=2))
    assert path != result_path(opened, EvalRequest(data=generated_data / "train", num_calls=256))
    records = evaluate(opened, request, progress=False)
    write_records(path, records, request)
    assert read_eval_records(export.parent.parent) == records


# What the value of a metric depends on, and what it does not, each changed from `EvalRequest`'s default.
COMMON: dict[str, Any] = {"weights": "model", "seed": 1}
IMPORTANCE: dict[str, Any] = {"num_calls": 256}
EXACT: dict[str, Any] = {"num_images": 2}
DISTANCE: dict[str, Any] = {
    "num_samples": 16,
    "num_reference": 32,
    "feature_net": "other",
    "sampling": SamplingConfig(respacing="20"),
}


@pytest.mark.parametrize(
    ("asked", "heard", "unheard"),
    [
        ({"metrics": ("nll",)}, IMPORTANCE | {"nll_mode": "exact"}, EXACT | DISTANCE),
        ({"metrics": ("nll",), "nll_mode": "exact"}, EXACT, IMPORTANCE | DISTANCE),
        ({"metrics": ("fd",)}, DISTANCE, IMPORTANCE | EXACT | {"nll_mode": "exact"}),
        ({"metrics": ("nll", "fd")}, IMPORTANCE | DISTANCE | {"nll_mode": "exact"}, EXACT),
    ],
)
def test_keys_hold_what_their_metrics_use_and_no_more(
    generated_data: Path, asked: dict[str, Any], heard: dict[str, Any], unheard: dict[str, Any]
) -> None:
    def key(weights: str = "abc", **change: Any) -> str:
        return EvalRequest(**({"data": generated_data / "test"} | asked | change)).key(weights)

    for name, value in unheard.items():
        assert key(**{name: value}) == key(), name
    changed = [key(**{name: value}) for name, value in (COMMON | heard).items()]
    changed += [
        key("abd"),
        key(data=generated_data / "train"),
        key(metrics=("fd",) if len(asked["metrics"]) > 1 else ("nll", "fd")),
    ]
    assert len({key(), *changed}) == len(changed) + 1


def test_an_export_is_verified_once(
    export: Path, generated_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[Path] = []

    def counted(folder: Path) -> str | None:
        verified.append(folder)
        return verify(folder)

    monkeypatch.setattr("trainer.export.verify", counted)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 0))  # MLflow's mirror
    monkeypatch.setattr(sys, "argv", ["x", str(export), "--data", str(generated_data / "test"), "--num-calls", "256"])
    assert main() == 0
    assert verified == [export]


def test_impossible_steps_are_refused_before_any_work(
    export: Path, generated_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(Export, "network", loaded)
    steps = SamplingConfig(respacing="ddim33")
    request = EvalRequest(data=generated_data / "test", metrics=("nll", "fd"), num_samples=2, sampling=steps)
    with pytest.raises(UserError, match="ddim33"):
        evaluate(export, request, progress=False)


def test_an_upsampler_is_refused_with_advice_that_exists(
    tiny_config: Path, generated_data: Path, tmp_path: Path
) -> None:
    upsampler = make_export(tmp_path / "upsampler", make_stage(tiny_config, "model.low_res_size=8"))
    with pytest.raises(UserError, match=r"`python -m evaluation.sample BASE UPSAMPLER --out samples.npz`"):
        evaluate(upsampler, EvalRequest(data=generated_data / "test"), progress=False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evaluation.evaluate", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=120
    )


def test_the_command_prints_records_of_both_metrics(export: Path, generated_data: Path, tmp_path: Path) -> None:
    done = command(
        str(export), "--data", str(generated_data / "test"), "--metrics", "nll,fd", "--num-calls", "256",
        "--num-samples", "16", "--respacing", "3", "--out", str(tmp_path / "records.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    nll, distance = json.loads(done.stdout)
    assert (nll["metric"], distance["metric"]) == ("nll", "fd_efflite0")
    assert nll["stderr"] > 0
    assert distance["n"] == 16
    assert distance["details"]["floor"] > 0
    assert json.loads((tmp_path / "records.json").read_text())["records"] == [nll, distance]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--metrics", "fid9"], "unknown metric fid9"),
        (["--num-calls", "3"], "--num-calls 3"),
        (["--num-threads", "0"], "--num-threads 0"),
        (["--num-reference", "0"], "--num-reference 0"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_message(export: Path, generated_data: Path, change: list[str], said: str) -> None:
    done = command(str(export), "--data", str(generated_data / "test"), *change)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
