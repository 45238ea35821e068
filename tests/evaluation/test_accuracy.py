"""The accuracy of classifiers of noisy images: against plain counting, shared, and refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_data import CLASSIFIER
from random_stage import make_export, make_stage

from data_pipeline.counter_rng import Stream, normal
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import UserError
from evaluation.accuracy import Accuracy, Calls
from evaluation.chunks import Chunks, FinishedElsewhere, Shard
from evaluation.evaluate import evaluate, evaluate_to
from evaluation.paired import main as paired
from evaluation.report.tables import metrics_table
from evaluation.request import EvalRequest
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.export import open_export
from trainer.tracking.records import read_result


@pytest.fixture(scope="module")
def classifier(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("classifier") / "000000000008", make_stage(tiny_config, *CLASSIFIER))


def test_calls_are_even_in_images_and_times() -> None:
    calls = Calls.draw(64, 100, 200, seed=3)
    counts = np.bincount(calls.image, minlength=64)
    assert {*counts.tolist()} == {3, 4}
    assert np.bincount(calls.t, minlength=100).tolist() == [2] * 100
    assert (Calls.draw(64, 100, 200, seed=3).t == calls.t).all()
    assert (Calls.draw(64, 100, 200, seed=4).t != calls.t).any()


def test_values_are_those_of_plain_counting(classifier: Path, generated_data: Path, tmp_path: Path) -> None:
    dataset = ShardDataset(generated_data / "test")
    request = EvalRequest(data=generated_data / "test", metrics=("accuracy",), accuracy_calls=200, seed=3)
    records = evaluate(classifier, request, artifacts=tmp_path, progress=False)
    calls, export = Calls.draw(64, 100, 200, seed=3), open_export(classifier)
    images, labels = dataset.read(calls.image)
    process = GaussianDiffusion.create(export.config.diffusion)
    noise = torch.from_numpy(normal(3, Stream.ACCURACY_NOISE, 0, 200, (3, 16, 16)))
    t, truth = torch.from_numpy(calls.t), torch.from_numpy(labels)
    x_t = process.q_sample(torch.from_numpy(images).float() / 127.5 - 1, t, noise)
    log_p = export.network("ema")(x_t, process.network_time(t)).log_softmax(dim=1)
    right = (log_p.argmax(dim=1) == truth).double()
    assert [r.metric for r in records] == ["cross_entropy", "accuracy"]  # four classes: no top 5
    entropy, accuracy = records
    assert accuracy.value == float(right.mean())
    assert accuracy.stderr == pytest.approx(float(right.std() / 200**0.5))
    assert entropy.value == pytest.approx(float(-log_p.gather(1, truth[:, None]).mean()), rel=1e-5)
    assert accuracy.details["q3"] == pytest.approx(float(right[t >= 75].mean()))
    assert (accuracy.n, accuracy.split, accuracy.weights) == (200, "test", export.weights_sha256["ema"])
    assert accuracy.measured == {"t": "uniform", "num_timesteps": 100, "schedule": "cosine", "weights": "ema"}
    with np.load(tmp_path / "accuracy_per_t.npz") as by_t:
        assert by_t["edges"].tolist() == list(range(0, 101, 5))
        assert by_t["count"].tolist() == [10] * 20
        assert by_t["accuracy"][4] == pytest.approx(float(right[(t >= 20) & (t < 25)].mean()))
    assert (tmp_path / "accuracy_per_t.png").stat().st_size > 0


def test_tables_name_the_shape_of_a_sigmoid(tiny_config: Path, generated_data: Path, tmp_path: Path) -> None:
    sigmoid = make_stage(tiny_config, *CLASSIFIER, "diffusion.schedule=sigmoid", "diffusion.sigmoid_tau=0.9")
    request = EvalRequest(data=generated_data / "test", metrics=("accuracy",), accuracy_calls=4)
    records = evaluate(make_export(tmp_path / "000000000008", sigmoid), request, progress=False)
    assert metrics_table(records).count("uniform t of 100 sigmoid steps; from -3 to 3, tau 0.9") == 2


def test_ranges_without_a_call_say_so() -> None:
    found = Accuracy(np.array([0, 1]), {"accuracy": np.array([1.0, 0.0])}, num_timesteps=4)
    assert found.over_all()["accuracy"].details == {"q0": 1.0, "q1": 0.0}
    assert np.isnan(found.by_t["accuracy"][2:]).all()


def test_processes_share_it(classifier: Path, generated_data: Path, tmp_path: Path) -> None:
    request = EvalRequest(data=generated_data / "test", metrics=("accuracy",), accuracy_calls=300)
    alone = evaluate(classifier, request, progress=False)
    with pytest.raises(FinishedElsewhere):
        evaluate(classifier, request, chunks=Chunks(tmp_path / "chunks", shard=Shard(1, 2)), progress=False)
    chunks = Chunks(tmp_path / "chunks", shard=Shard(0, 2), patience=0)
    assert [r.value for r in evaluate(classifier, request, chunks=chunks, progress=False)] == [r.value for r in alone]
    assert evaluate_to(tmp_path / "out.json", classifier, request, progress=False)
    assert [r.value for r in read_result(tmp_path / "out.json")] == [r.value for r in alone]


def test_what_is_asked_of_the_wrong_network(
    classifier: Path, tiny_config: Path, generated_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, unet = generated_data / "test", make_export(tmp_path / "unet", make_stage(tiny_config))
    for metric in ("nll", "fd", "memorisation"):
        request = EvalRequest(data=data, metrics=(metric, "accuracy"), train_data=generated_data / "train")
        with pytest.raises(UserError, match=rf"--metrics {metric}: noisy is a classifier, .*--metrics accuracy"):
            evaluate(classifier, request)
    with pytest.raises(UserError, match=r"--metrics accuracy is of classifiers .*which tiny is not"):
        evaluate(unet, EvalRequest(data=data, metrics=("nll", "accuracy")))
    with pytest.raises(UserError, match="--accuracy-calls 1 is too small"):
        EvalRequest(data=data, metrics=("accuracy",), accuracy_calls=1).check()
    monkeypatch.setattr("sys.argv", ["paired", str(classifier), str(unet), "--data", str(data)])
    with pytest.raises(UserError, match="noisy is a classifier"):
        paired()
