"""Points read back from a tracker are those that the files hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tracking_records import FLOPS, eval_record, write_eval

from data_pipeline.errors import DataError
from evaluation.scaling.points import Point, point_from_record, write_csv
from evaluation.scaling.sources import ColumnNames, Selection, read_points
from trainer.tracking.mlflow_points import points_of_experiment
from trainer.tracking.mlflow_store import Tracker
from trainer.tracking.mlflow_sync import sync_folder
from trainer.tracking.points import LawRun, save_law_runs


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two trials and an extra one that no law is fitted to."""
    for number, (name, fitted) in enumerate([("c4-seed0", "yes"), ("c8-seed0", "yes"), ("other", "no")]):
        folder = tmp_path / "study" / "trials" / name
        folder.mkdir(parents=True)
        tags = {"study": "s", "size": name, "fitted": fitted}
        about = {"id": name, "name": name.upper(), "seed": number, "num_params": 10 * (number + 1), "tags": tags}
        (folder / "run.json").write_text(json.dumps(about))
        for nimg in (300, 700, 100_000):
            write_eval(
                folder, *(record for split in ("test", "train") for record in records(number, name, nimg, split))
            )
    return tmp_path / "study"


def records(number: int, run: str, nimg: int, split: str) -> list[Any]:
    nll = dataclasses.replace(
        eval_record(nimg, split, value=3.1 + number / 7), run=run, num_params=10 * (number + 1), seed=number,
        measured={"bound": "L_vlb", "num_timesteps": 4000}, compute=nimg * FLOPS * (number + 1) / 3,
    )  # fmt: skip
    distance = dataclasses.replace(nll, metric="fd_x", stderr=None, n=512, measured={"sampler": "ddim"}, value=70.0)
    return [nll, distance] if split == "test" else [nll]


@pytest.fixture
def sent(study: Path, tracker: Tracker, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study in the store that MLFLOW_TRACKING_URI names, with a fit beside the trials."""
    curve = {"nll/test": [[1e9, 3.0], [1e10, 2.0]]}
    save_law_runs(study / "law", [LawRun("law", "law", "s", 1.0, tags={"kind": "law"}, curves=curve)])
    sync_folder(study, tracker, {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    return study


def expected(metric: str, split: str) -> list[Point]:
    runs = [(0, "c4-seed0"), (1, "c8-seed0")]
    every = [r for number, run in runs for n in (300, 700, 100_000) for r in records(number, run, n, split)]
    return [point_from_record(record) for record in every if record.metric == metric]


@pytest.mark.parametrize(("metric", "split"), [("nll", "test"), ("nll", "train"), ("fd_x", "test")])
def test_a_study_comes_back_as_its_files_have_it(sent: Path, tmp_path: Path, metric: str, split: str) -> None:
    selection = Selection(metric, split)
    from_mlflow = read_points("mlflow:s", selection=selection)
    assert from_mlflow == expected(metric, split)
    assert read_points("mlflow:s", ColumnNames(value=f"{metric}/{split}")) == from_mlflow
    write_csv(sent / "law" / "points.csv", expected(metric, split))
    assert read_points(str(sent), selection=selection) == from_mlflow


def test_evaluations_of_other_data_keep_what_they_measured(sent: Path, tracker: Tracker) -> None:
    folder = sent / "trials" / "c4-seed0"
    other = dataclasses.replace(records(0, "c4-seed0", 900, "test")[0], data="another")
    write_eval(folder, other)
    sync_folder(sent, tracker, {})
    found = {
        p.images: p.data for p in read_points("mlflow:s", selection=Selection("nll", "test")) if p.run == "c4-seed0"
    }
    assert found == {300: "d", 700: "d", 900: "another", 100_000: "d"}


def foreign(database: Path) -> None:
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.create_experiment("theirs")
    for width in (64, 128):
        run = client.create_run(experiment, run_name=f"w{width}").info.run_id
        client.log_param(run, "width", width)
        client.log_param(run, "params", f"{width}e3")
        for step in (10, 20, 30):
            client.log_metric(run, "val/loss", 5 - step / 10, step=step)
            client.log_metric(run, "sem", 0.1, step=step)
            if step != 20:
                client.log_metric(run, "flops", step * 1e6 * width, step=step)


def test_a_foreign_experiment_is_read_where_value_and_compute_share_a_step(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    names = ColumnNames("flops", "val/loss", "sem", "width", "params", "step")
    points = read_points("mlflow:theirs", names)
    assert [(p.run, p.compute, p.value) for p in points] == [
        ("128", 1.28e9, 4.0), ("128", 3.84e9, 2.0), ("64", 6.4e8, 4.0), ("64", 1.92e9, 2.0),
    ]  # fmt: skip
    assert {(p.metric, p.split, p.stderr, p.flop_convention) for p in points} == {("val/loss", "", 0.1, "unstated")}
    assert [(p.num_params, p.images) for p in points] == [(128_000, 10), (128_000, 30), (64_000, 10), (64_000, 30)]
    by_step = read_points("mlflow:theirs", ColumnNames("step", "val/loss"))
    assert [p.compute for p in by_step] == [10, 20, 30] * 2


@pytest.mark.parametrize(
    ("experiment", "names", "message"),
    [
        ("nowhere", {}, "has no experiment 'nowhere'; it has: "),
        ("theirs", {}, "holds no run of ours"),
        ("theirs", {"value": "loss"}, "no run with the metric 'loss'; it has: flops, sem, val/loss"),
        ("theirs", {"value": "val/loss", "compute": "x"}, "no value of 'val/loss' has 'x' at the same step"),
        ("theirs", {"value": "val/loss", "compute": "flops", "run": "depth"}, "no parameter and no tag 'depth'"),
        ("theirs", {"value": "val/loss", "compute": "flops", "stderr": "se"}, "has no metric 'se'"),
        ("theirs", {"value": "val/loss", "compute": "flops", "num_params": "mlflow.runName"}, "is not a whole number"),
    ],
)
def test_what_is_not_there_is_named(
    database: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, names: dict[str, str], message: str
) -> None:
    foreign(database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with pytest.raises(DataError) as caught:
        points_of_experiment(experiment, **names)
    assert message in str(caught.value)


def test_reading_makes_no_database_and_says_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(DataError, match="there is no MLflow database"):
        points_of_experiment("s")
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter22@127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        points_of_experiment("s")
    assert "hunter22" not in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)
