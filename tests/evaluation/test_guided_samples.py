"""Guidance by a classifier as commands and records know it: named by what it is, wherever it lies."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_data import CLASSIFIER
from random_stage import make_export, make_stage

from data_pipeline.errors import UserError
from evaluation.evaluate import _parser, _request, evaluate
from evaluation.request import EvalRequest
from evaluation.sample import main as sample_command
from trainer.config.sampling import SamplingConfig
from trainer.export import open_export


@pytest.fixture(scope="module")
def exports(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unconditional network and a classifier of four classes, both with random weights."""
    folder = tmp_path_factory.mktemp("exports")
    make_export(folder / "unet", make_stage(tiny_config))
    make_export(folder / "upsampler", make_stage(tiny_config, "model.image_size=32", "model.low_res_size=16"))
    stage = make_stage(tiny_config, *CLASSIFIER)
    with torch.no_grad():
        stage.network.get_parameter("pool.proj.weight").mul_(200)
    make_export(folder / "classifier", stage)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, words), "--respacing", "4", "--batch", "4"])
    assert sample_command() == 0


def images(path: Path) -> tuple[np.ndarray, list[int] | None]:
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"].tolist() if "arr_1" in file else None


def test_the_command_guides(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of a network without classes get those of the classifier."""
    guide = ["--classifier", exports / "classifier", "--classifier-scale", 3]
    run(monkeypatch, exports / "unet", "--num", 6, "--out", tmp_path / "plain.npz")
    run(monkeypatch, exports / "unet", "--num", 6, "--out", tmp_path / "guided.npz", *guide)
    run(monkeypatch, exports / "unet", "--num", 6, "--out", tmp_path / "one.npz", *guide, "--classes", 2)
    (plain, none), (guided, turns), (one, same) = (images(tmp_path / f"{n}.npz") for n in ("plain", "guided", "one"))
    assert (none, turns, same) == (None, [0, 1, 2, 3, 0, 1], [2] * 6)
    assert (plain != guided).mean() > 0.1
    assert (one[2] == guided[2]).mean() > 0.99
    account = json.loads((tmp_path / "guided.json").read_text())
    sha256 = open_export(exports / "classifier").weights_sha256["ema"]
    assert account["options"]["stage1.classifier_sha256"] == sha256
    assert account["options"]["stage1.classifier_scale"] == 3.0
    assert account["classifier"] == [str(exports / "classifier")]
    assert not any("classifier" in name for name in json.loads((tmp_path / "plain.json").read_text())["options"])
    elsewhere = shutil.copytree(exports / "classifier", tmp_path / "elsewhere")
    before = (tmp_path / "guided.npz").stat().st_mtime_ns
    guide[1] = elsewhere
    run(monkeypatch, exports / "unet", "--num", 6, "--out", tmp_path / "guided.npz", *guide)  # the same images: kept
    assert (tmp_path / "guided.npz").stat().st_mtime_ns == before


def test_each_stage_of_a_cascade_has_its_own(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [exports / "unet", exports / "upsampler", "--num", 4]
    guide = ["--classifier", exports / "classifier", "--classifier", "none"]
    run(monkeypatch, *both, "--out", tmp_path / "guided.npz", *guide, "--classifier-scale", 3)
    options = json.loads((tmp_path / "guided.json").read_text())["options"]
    assert options["stage1.classifier_scale"] == 3.0
    assert "stage2.classifier_scale" not in options
    assert images(tmp_path / "guided.npz")[1] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"classifier=.* cannot guide tiny: .*model.image_size=16, not 32"):
        run(monkeypatch, *both, "--out", tmp_path / "b.npz", "--classifier", exports / "classifier")
    with pytest.raises(UserError, match=r"--classifier-scale 3 is for a stage with --classifier none"):
        run(monkeypatch, *both, "--out", tmp_path / "b.npz", *guide, "--classifier-scale", 2, "--classifier-scale", 3)
    for words, said in (
        (["--classifier-scale", 2], "--classifier-scale 2 is for --classifier EXPORT"),
        (["--classifier", "none", "--classifier-scale", 3], "--classifier-scale 3 is for --classifier EXPORT"),
        (["--classifier", "none", "--classifier-weights", "model"], "classifier_weights=model is for a classifier"),
        ([*guide[:2], "--classes", "1,7"], "class 7 is unknown to it: it knows 0 to 3"),
        (["--classes", 1], "these networks know no classes"),
    ):
        with pytest.raises(UserError, match=said):
            run(monkeypatch, exports / "unet", "--out", tmp_path / "c.npz", *words)
    with pytest.raises(UserError, match=r"stage 1 \(noisy\) is a classifier"):
        run(monkeypatch, exports / "classifier", "--out", tmp_path / "c.npz")


def test_evaluations_are_told_alike(exports: Path, generated_data: Path) -> None:
    words = ["--data", str(generated_data / "test"), "--classifier", str(exports / "classifier")]
    words += ["--classifier-scale", "2", "--classifier-weights", "model", "--accuracy-calls", "7"]
    request = _request(_parser().parse_args([str(exports / "unet"), *words]))
    assert request.sampling.classifier == exports / "classifier"
    assert (request.sampling.classifier_scale, request.sampling.classifier_weights) == (2.0, "model")
    assert request.accuracy_calls == 7


def test_records_name_the_classifier(exports: Path, generated_data: Path, tmp_path: Path) -> None:
    def request(classifier: Path | None, **how: object) -> EvalRequest:
        sampling = SamplingConfig(respacing="2", classifier=classifier, **how)  # type: ignore[arg-type]
        return EvalRequest(data=generated_data / "test", metrics=("fd",), num_samples=4, batch=4, sampling=sampling)

    elsewhere = shutil.copytree(exports / "classifier", tmp_path / "elsewhere")
    guided, moved = request(exports / "classifier"), request(elsewhere)
    keys = [r.key("abc") for r in (request(None), guided, request(elsewhere, classifier_scale=2.0))]
    assert len(set(keys)) == 3
    assert guided.key("abc") == moved.key("abc")
    (record,) = evaluate(exports / "unet", guided, progress=False)
    assert record.measured["classifier_sha256"] == open_export(elsewhere).weights_sha256["ema"]
    assert record.measured["classifier_scale"] == 1.0
    assert "classifier" not in record.measured
    with pytest.raises(UserError, match="is no classifier"):
        evaluate(exports / "unet", request(exports / "unet"))
