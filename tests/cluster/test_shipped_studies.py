"""The big studies really start: two steps of their smallest width, on generated images of their size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.definition.spec import load_study
from cluster.definition.trials import Trial, make_trials
from cluster.files.folder import StudyFolder
from evaluation.scaling.__main__ import main as scaling
from evaluation.scaling.points import Point, write_csv
from trainer.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "configs" / "studies"


def generated(folder: Path, size: int) -> Path:
    command = ["generated", "--out", str(folder), "--size", str(size), "--num-train", "4", "--num-test", "4"]
    subprocess.run(
        [sys.executable, "-m", "data_pipeline.prepare", *command, "--num-classes", "1000"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "train"


def two_steps(config: RunConfig, data: Path, folder: Path) -> None:
    """Two steps of one image of this very config; only batch, budget, precision and places are changed."""
    overrides = [
        "train.global_batch=1", "train.micro_batch=1", "train.budget_images=2", "train.export_images=[]",
        "train.sample_grid.num_images=0", "data.num_workers=0", "engine.precision=fp32", "engine.num_cpu_threads=2",
        f"data.train={data}", f"run.folder={folder / 'run'}",
    ]  # fmt: skip
    from trainer.config.tree import save_config

    save_config(config, folder / "trial.yaml")
    command = [sys.executable, "trainer/run.py", "--config", str(folder / "trial.yaml"), *overrides]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["nimg"] == 2


def trial(study: str, label: str, *overrides: str) -> Trial:
    found = {t.label: t for t in make_trials(load_study(STUDIES / f"{study}.yaml", overrides))}
    return found[label]


@pytest.mark.timeout(300)
def test_imagenet64_starts(tmp_path: Path) -> None:
    chosen = trial("imagenet64", "C=64")
    assert chosen.cost.num_params == 30_303_494
    two_steps(chosen.config, generated(tmp_path / "data", 64), tmp_path)


@pytest.mark.timeout(300)
def test_imagenet256_starts(tmp_path: Path) -> None:
    chosen = trial("imagenet256", "C=64")
    assert chosen.config.model.image_size == 256
    two_steps(chosen.config, generated(tmp_path / "data", 256), tmp_path)


@pytest.mark.timeout(300)
def test_the_upsampler_of_the_two_stage_route_starts_at_64_channels(tmp_path: Path) -> None:
    chosen = trial("imagenet256", "two-stage-upsampler")
    narrow = chosen.config.model.model_copy(update={"channels": 64})
    two_steps(chosen.config.model_copy(update={"model": narrow}), generated(tmp_path / "data", 256), tmp_path)


def test_a_grid_of_equal_compute_gives_the_best_size_at_each_of_its_budgets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made points, 2.9 + 300 N^-0.5 + 60 D^-0.34 with a scatter of 0.1 %: N* grows as C^(0.34 / (0.5 + 0.34))."""
    study, rng = load_study(STUDIES / "cifar10_isoflop.yaml"), np.random.default_rng(0)
    points = [
        Point(
            metric="nll", split="test", stderr=0.003, compute=nimg * one.cost.train_flops, seed=one.seed, run=one.name,
            value=(2.9 + 300 * one.cost.num_params**-0.5 + 60 * nimg**-0.34) * math.exp(rng.normal(0, 0.001)),
            num_params=one.cost.num_params, images=nimg, flop_convention="2 per multiply-add",
        )
        for one in make_trials(study) for nimg in one.export_images
    ]  # fmt: skip
    write_csv(tmp_path / "points.csv", points)
    monkeypatch.setattr(sys, "argv", ["scaling", "isoflop", str(tmp_path / "points.csv"), "--json"])
    assert scaling() == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["status"] for s in found["slices"]] == ["ok"] * len(study.evaluation.flops or ())
    assert [s["budget"] for s in found["slices"]] == pytest.approx(study.evaluation.flops, rel=0.01)
    assert not any(s["interpolated"] for s in found["slices"])  # the points are at equal compute as they are
    low, high = found["size_law"]["exponent_interval"]
    assert low < 0.34 / 0.84 < high


def test_the_evaluations_of_the_shipped_studies_are_ones_that_exist(tmp_path: Path) -> None:
    from cluster.files.folder import requests
    from evaluation.features import REGISTRY

    for path in STUDIES.glob("*.yaml"):
        study = load_study(path)
        folder = StudyFolder(tmp_path, study, make_trials(study))
        for name, one in folder.trials.items():
            if one.evaluated:
                wanted = requests(study, one, one.total_images)
                assert wanted, name
                for request in wanted:
                    request.check()
                    assert request.feature_net in REGISTRY
