"""`python -m evaluation.evaluate`: keys, records, pictures, processes that share the work, ensembles, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_stage import make_export, make_stage
from ranks import run_ranks

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic as write
from evaluation.chunks import Shard
from evaluation.ensemble import Ensemble, TimeRanges
from evaluation.evaluate import evaluate, evaluate_to, main
from evaluation.measure import over_repeats
from evaluation.nll.settings import NllSettings
from evaluation.quality import Measured
from evaluation.report.tables import metrics_table
from evaluation.request import EvalRequest
from evaluation.results import artifacts_of, chunks_of, key_of, result_path, write_records
from evaluation.subject import identity_in_manifest, open_subject, weights_identity
from evaluation.table import records_in
from trainer.checkpoint import verify
from trainer.config.sampling import SamplingConfig
from trainer.diffusion.thresholding import static
from trainer.export import Export, open_export
from trainer.tracking.records import read_eval_records, read_result

ROOT = Path(__file__).resolve().parents[2]
FEW = NllSettings(num_calls=256)
QUICK = SamplingConfig(respacing="3")


@pytest.fixture(scope="module")
def made(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an export, of a network with random weights."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    make_export(folder / "exports" / "000000000048", make_stage(tiny_config))
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    """The same, for one test alone."""
    shutil.copytree(made, tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    return tmp_path / "run" / "exports" / "000000000048"


# ---- what was measured, and its name ---------------------------------------------------------------------------------


@pytest.mark.prove
def test_a_trained_networks_importance_estimate_agrees_with_the_full_sweep(
    tiny_config: Path, generated_data: Path, tmp_path: Path
) -> None:
    run_ranks(["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'run'}"], 1)
    export, data = tmp_path / "run" / "exports" / "000000000048", generated_data / "test"
    exactly = NllSettings(mode="exact")
    (exact,) = evaluate(export, EvalRequest(data=data, nll=exactly), progress=False)
    (ours,) = evaluate(export, EvalRequest(data=data), progress=False)
    assert exact.stderr is None  # the whole split
    assert ours.stderr is not None
    assert abs(ours.value - exact.value) < 4 * ours.stderr
    again = evaluate(export, EvalRequest(data=data), progress=False)[0]
    assert (again.value, again.stderr) == (ours.value, ours.stderr)
    model = evaluate(export, EvalRequest(data=data, weights="model"), progress=False)[0]
    assert model.weights != ours.weights
    assert model.value != ours.value


def test_equal_weights_under_another_config_are_another_network(tiny_config: Path, tmp_path: Path) -> None:
    stage, linear = make_stage(tiny_config), make_stage(tiny_config, "diffusion.schedule=linear")
    first, second = (open_export(make_export(tmp_path / name, s)) for name, s in (("a", stage), ("b", linear)))
    assert first.weights_sha256 == second.weights_sha256
    assert weights_identity(first, "ema") != weights_identity(second, "ema")
    files = json.loads((first.path / "manifest.json").read_text())["files"]
    assert identity_in_manifest(files, "ema") == weights_identity(first, "ema")


def test_records_say_that_an_average_was_made_after_training(made: Path, generated_data: Path) -> None:
    tracked = open_export(made / "exports" / "000000000048")
    origin = {"profile_error": 0.22, "num_snapshots": 6}
    export = dataclasses.replace(tracked, info=tracked.info | {"reconstructed": {"ema": origin}})
    request = EvalRequest(data=generated_data / "test", nll=FEW)
    said = [
        evaluate(export, dataclasses.replace(request, weights=weights), progress=False)[0]
        for weights in ("ema", "model")
    ]
    assert [record.reconstructed for record in said] == [origin, None]
    assert ["reconstructed, profile error 0.22" in metrics_table([record]) for record in said] == [True, False]
    assert said[0].measured == evaluate(tracked, request, progress=False)[0].measured


# What the value of a metric depends on, and what it does not, each changed from `EvalRequest`'s default.
COMMON: dict[str, Any] = {"weights": "model", "seed": 1}
BOUND: list[NllSettings] = [NllSettings(respacing="10"), NllSettings(clip_denoised=False), NllSettings(mode="uniform")]
IMPORTANCE: list[NllSettings] = [NllSettings(num_calls=256), NllSettings(target_stderr=0.1)]
EXACT: list[NllSettings] = [NllSettings(num_images=2)]
QUALITY: dict[str, Any] = {
    "num_samples": 16,
    "repeats": 2,
    "batch": 8,
    "num_reference": 32,
    "feature_net": "other",
    "sampling": SamplingConfig(respacing="20"),
}


@pytest.mark.parametrize(
    ("metrics", "heard", "unheard"),
    [
        (("nll",), IMPORTANCE, EXACT),
        (("fd",), [], IMPORTANCE + EXACT + BOUND),
        (("nll", "fd"), IMPORTANCE + BOUND, EXACT),
    ],
)
def test_keys_hold_what_their_metrics_use_and_no_more(
    generated_data: Path, metrics: tuple[str, ...], heard: list[NllSettings], unheard: list[NllSettings]
) -> None:
    def key(weights: str = "abc", **change: Any) -> str:
        return EvalRequest(**({"data": generated_data / "test", "metrics": metrics} | change)).key(weights)

    assert all(key(nll=settings) == key() for settings in unheard)
    assert key(num_threads=2) == key()
    changed = [key(nll=settings) for settings in heard] + [key(**{name: value}) for name, value in COMMON.items()]
    changed += [key("abd"), key(data=generated_data / "train"), key(metrics=("kd",))]
    for name, value in QUALITY.items():
        if "fd" in metrics:
            changed.append(key(**{name: value}))
        else:
            assert key(**{name: value}) == key(), name
    assert len({key(), *changed}) == len(changed) + 1


def test_an_exact_sweeps_key_does_not_hear_of_calls(generated_data: Path) -> None:
    def key(**settings: Any) -> str:
        return EvalRequest(data=generated_data / "test", nll=NllSettings(mode="exact", **settings)).key("abc")

    assert key(num_calls=256) == key()
    assert key(num_images=3) != key()


def test_a_weights_file_counts_by_its_content(generated_data: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    first.write_bytes(b"x")
    second.write_bytes(b"x")
    other.write_bytes(b"y")
    keys = [
        EvalRequest(data=generated_data / "test", metrics=("fd",), feature_weights=path).key("abc")
        for path in (first, second, other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_repeats_give_a_mean_and_its_error() -> None:
    values = [Measured(value, None, {"floor": 3.0}) for value in (1.0, 2.0, 4.0)]
    found = over_repeats(values)
    assert found.value == pytest.approx(7 / 3)
    assert found.stderr == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert found.details == {"floor": 3.0, "repeats": [1.0, 2.0, 4.0]}
    assert over_repeats(values[:1]) == values[0]


# ---- processes and interruptions -------------------------------------------------------------------------------------


def request_of(data: Path) -> EvalRequest:
    return EvalRequest(
        data=data / "test", metrics=("nll", "fd", "kd"), nll=FEW, num_samples=20, repeats=2, batch=4, sampling=QUICK,
        num_threads=1,
    )  # fmt: skip


def told(path: Path) -> list[dict[str, Any]]:
    """Records without the time at which they were made."""
    return [{k: v for k, v in record.to_json().items() if k != "time"} for record in read_result(path)]


@pytest.fixture(scope="module")
def alone(made: Path, generated_data: Path) -> Path:
    """The result of one process that nobody disturbed."""
    export = made / "exports" / "000000000048"
    request = request_of(generated_data)
    assert evaluate_to(result_path(open_export(export), request), export, request, progress=False)
    return result_path(open_export(export), request)


def test_records_and_pictures_are_beside_the_run(alone: Path, made: Path, generated_data: Path) -> None:
    export, request = made / "exports" / "000000000048", request_of(generated_data)
    assert alone.parent == made / "evals" / export.name
    assert sorted(r.metric for r in read_eval_records(made)) == ["fd_efflite0", "kd_efflite0", "nll"]
    names = {path.name for path in artifacts_of(alone).iterdir()}
    assert {"nll.npz", "nll_per_t.png", "samples_seed0.png", "samples_seed1.png"} <= names
    assert not chunks_of(alone, key_of(open_export(export), request)).exists()
    table = (made / "evals" / "metrics.txt").read_text()
    assert "Fréchet distance (EfficientNet-Lite0)" in table
    assert "±" in table
    assert not evaluate_to(alone, export, request, progress=False)  # it is there


def test_two_processes_give_the_same_bits_as_one(
    alone: Path, export: Path, generated_data: Path, tmp_path: Path
) -> None:
    result = tmp_path / "shared.json"
    second = start_evaluation(result, export, generated_data, Shard(1, 2))
    assert evaluate_to(result, export, request_of(generated_data), shard=Shard(0, 2), progress=False)
    assert second.wait(timeout=100) == 0
    assert told(result) == told(alone)


def test_a_killed_evaluation_goes_on(alone: Path, export: Path, generated_data: Path, tmp_path: Path) -> None:
    request, result = request_of(generated_data), tmp_path / "killed.json"
    made = chunks_of(result, key_of(open_export(export), request))
    process = start_evaluation(result, export, generated_data, Shard(), die_after="samples0/000002.npz")
    assert process.wait(timeout=100) == -signal.SIGKILL
    left = {path.relative_to(made) for path in made.glob("*/*.npz")}
    assert Path("samples0/000002.npz") in left
    assert Path("samples0/000003.npz") not in left
    with pytest.MonkeyPatch.context() as patch:
        again: list[Path] = []
        patch.setattr("evaluation.chunks.write_atomic", lambda p, c: (again.append(p.relative_to(made)), write(p, c)))
        assert evaluate_to(result, export, request, progress=False)
    assert again
    assert not left & set(again)
    assert told(result) == told(alone)


def start_evaluation(
    result: Path, export: Path, data: Path, shard: Shard, *, die_after: str = "nothing"
) -> subprocess.Popen[bytes]:  # fmt: skip
    """One of the processes of an evaluation; it is killed when it has written the chunk `die_after`."""
    script = """
import os, pathlib, signal, sys
import evaluation.chunks
from test_evaluate import Shard, evaluate_to, request_of, write

def write_or_die(path, content):
    write(path, content)
    if str(path).endswith(sys.argv[6]):
        os.kill(os.getpid(), signal.SIGKILL)

evaluation.chunks.write_atomic = write_or_die
result, export, data = map(pathlib.Path, sys.argv[1:4])
evaluate_to(result, export, request_of(data), shard=Shard(*map(int, sys.argv[4:6])), progress=False)
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"}
    told = [result, export, data, shard.index, shard.count, die_after]
    return subprocess.Popen([sys.executable, "-c", script, *map(str, told)], env=environment)


def test_anothers_result_is_not_taken_for_ours(export: Path, generated_data: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    write_records(result, "another", evaluate(export, EvalRequest(data=generated_data / "test", nll=FEW)), EvalRequest(
        data=generated_data / "test"))  # fmt: skip
    with pytest.raises(UserError, match="not the result of this evaluation"):
        evaluate_to(result, export, EvalRequest(data=generated_data / "test", nll=FEW))
    result.write_text("{}")
    with pytest.raises(UserError, match="not the result of this evaluation"):
        evaluate_to(result, export, EvalRequest(data=generated_data / "test", nll=FEW), shard=Shard(0, 1))


# ---- ensembles -------------------------------------------------------------------------------------------------------


def test_each_network_of_an_ensemble_answers_in_its_range(tiny_config: Path) -> None:
    low, high = make_stage(tiny_config).network, make_stage(tiny_config, "model.dropout=0.1").network.eval()
    for parameter in high.parameters():
        parameter.data.mul_(1.1)
    both = TimeRanges(low, high, boundary=30.0)
    x = torch.randn(4, 3, 16, 16)
    time = torch.tensor([10.0, 60.0, 29.9, 30.0])
    with torch.no_grad():
        found = both(x, time)
        assert torch.equal(found[[0, 2]], low(x[[0, 2]], time[[0, 2]], None, None))
        assert torch.equal(found[[1, 3]], high(x[[1, 3]], time[[1, 3]], None, None))


def test_an_ensembles_bound_is_made_of_both(tiny_config: Path, generated_data: Path, tmp_path: Path) -> None:
    ours, other = make_stage(tiny_config), make_stage(tiny_config)
    for parameter in other.network.parameters():
        parameter.data.mul_(0.9)
    first, second = make_export(tmp_path / "first", ours), make_export(tmp_path / "second", other)
    half = ours.config.diffusion.num_timesteps // 2
    data = ShardDataset(generated_data / "test")

    def terms(ensemble: Ensemble | None, export: Path) -> np.ndarray:
        subject = open_subject(export, ensemble=ensemble)
        process = subject.diffusion()
        x0 = torch.from_numpy(data.read(np.arange(2))[0]).float() / 127.5 - 1
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        found = []
        for step in (half - 1, half):
            t = torch.full((2,), step)
            x_t = process.q_sample(x0, t, noise)
            output = subject.condition(np.zeros(2, dtype=np.int64))(x_t, process.network_time(t))
            found.append(process.vb_terms(process.predict(output, x_t, t, threshold=static), x0, x_t, t).numpy())
        return np.stack(found)  # [2 timesteps, 2 images]

    with torch.no_grad():
        both, own, others = terms(Ensemble(second, half), first), terms(None, first), terms(None, second)
    assert np.array_equal(both[0], others[0])  # t = half - 1 is below
    assert np.array_equal(both[1], own[1])
    assert not np.array_equal(own, others)

    request = EvalRequest(data=generated_data / "test", nll=FEW, ensemble=Ensemble(second, half))
    (record,) = evaluate(first, request, progress=False)
    assert record.measured["ensemble_below"] == half
    assert record.weights not in (open_export(first).weights_sha256["ema"], open_export(second).weights_sha256["ema"])
    for wrong in (0, ours.config.diffusion.num_timesteps):
        with pytest.raises(UserError, match="--ensemble-below"):
            evaluate(first, EvalRequest(data=generated_data / "test", ensemble=Ensemble(second, wrong)))
    linear = make_export(tmp_path / "linear", make_stage(tiny_config, "diffusion.schedule=linear"))
    with pytest.raises(UserError, match=r"differ in diffusion\.schedule"):
        evaluate(first, EvalRequest(data=generated_data / "test", ensemble=Ensemble(linear, half)))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_an_export_is_verified_once(
    export: Path, generated_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert "NLL (bits/dim)" in capsys.readouterr().out
    for folder in (export.parent.parent, export):
        assert [record.run for record in records_in(folder)] == ["run"]
    (result,) = export.parent.parent.glob("evals/*/*.json")
    result.write_text("{")
    with pytest.raises(UserError, match="delete it and measure again"):
        records_in(export.parent.parent)


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
    with pytest.raises(UserError, match="ddim33"):
        evaluate(export, EvalRequest(data=generated_data / "test", nll=NllSettings(respacing="ddim33")))
    guided = EvalRequest(data=generated_data / "test", metrics=("fd",), sampling=SamplingConfig(guidance=2.0))
    with pytest.raises(UserError, match="null class"):
        evaluate(export, guided)


def test_an_upsampler_is_refused_with_advice_that_exists(
    tiny_config: Path, generated_data: Path, tmp_path: Path
) -> None:
    upsampler = make_export(tmp_path / "upsampler", make_stage(tiny_config, "model.low_res_size=8"))
    with pytest.raises(UserError, match=r"`python -m evaluation.sample BASE UPSAMPLER --out samples.npz`"):
        evaluate(upsampler, EvalRequest(data=generated_data / "test"), progress=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--metrics", "fid9"], "unknown metric 'fid9'"),
        (["--metrics", "fid"], "--feature-net inception"),
        (["--metrics", "is"], "efflite0"),
        (["--num-calls", "3"], "--num-calls 3"),
        (["--target-stderr", "0"], "--target-stderr 0"),
        (["--num-threads", "0"], "--num-threads 0"),
        (["--num-reference", "0"], "--num-reference 0"),
        (["--seed", str(2**64)], "--seed"),
        (["--repeats", "0"], "--repeats 0"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--metrics", "fd", "--reference", "/nowhere.npz"], "/nowhere.npz"),
        (["--shard", "2/2"], "--shard 2/2"),
        (["--out", "/nowhere"], "must end in .json"),
        (["--ensemble-below", "5"], "--ensemble-below 5"),
        (["--metrics", "precision", "--num-samples", "3"], "--num-samples 3"),
    ],
)
def test_mistakes_are_one_message(
    made: Path, generated_data: Path, change: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = made / "exports" / "000000000048"
    monkeypatch.setattr(sys, "argv", ["x", str(export), "--data", str(generated_data / "test"), *change])
    with pytest.raises(UserError) as refused:
        main()
    assert said in str(refused.value)


def test_memorisation_is_measured_against_held_out_images(export: Path, generated_data: Path, tmp_path: Path) -> None:
    asked = EvalRequest(
        data=generated_data / "test", metrics=("memorisation",), sampling=QUICK, train_data=generated_data / "train"
    )
    (record,) = evaluate(export, asked, artifacts=tmp_path, progress=False)
    assert record.metric == "memorisation"
    assert record.value == pytest.approx(record.details["samples"] / record.details["held_out"])
    assert record.measured["train_data"] == ShardDataset(generated_data / "train").manifest.fingerprint
    assert (tmp_path / "nearest_training_images.png").stat().st_size > 1000
    with pytest.raises(UserError, match="let --data be another split"):
        evaluate(export, dataclasses.replace(asked, data=generated_data / "train"), progress=False)
    with pytest.raises(UserError, match="--train-data"):
        evaluate(export, dataclasses.replace(asked, train_data=None), progress=False)
    assert asked.key("abc") != dataclasses.replace(asked, train_data=generated_data / "test").key("abc")
