"""Records reach a real sqlite store once, whatever is lost or repeated."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tracking_records import FLOPS, eval_record, write_eval, write_records

from data_pipeline.errors import DataError, UserError
from evaluation.report.mlflow_views import experiment_tags
from trainer.tracking.follow import follow
from trainer.tracking.mlflow_pages import experiment_pages
from trainer.tracking.mlflow_store import Tracker, connect, require_answer, search_runs
from trainer.tracking.mlflow_study import NOTE_TAG, sync_law
from trainer.tracking.mlflow_sync import sync_folder, sync_run
from trainer.tracking.points import (
    LONGEST_KEY,
    LawRun,
    eval_points,
    flatten,
    load_law_runs,
    save_law_runs,
    train_points,
)
from trainer.tracking.records import EvalRecord, Place, TrainRecord, read_new_train_records
from trainer.tracking.uri import redact


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "study" / "trials" / "c8"
    folder.mkdir(parents=True)
    about = {"id": "unique", "name": "C=8", "seed": 0, "num_params": 10, "tags": {"size": "C=8", "study": "s"}}
    (folder / "run.json").write_text(json.dumps(about))
    config = {"model": {"channels": 8, "mult": [1, 2]}, "tracking": {"uri": "http://user:secret@host"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_records(folder, 0, range(100, 1100, 100), time=1000.0)
    for nimg in (200, 1000):
        write_eval(folder, eval_record(nimg), eval_record(nimg, "train"))
    return folder


def rows(database: Path) -> list[tuple[str, int, float]]:
    with sqlite3.connect(database) as connection:
        return connection.execute("select key, step, value from metrics order by key, step").fetchall()


def no_step_twice(database: Path) -> bool:
    return max(Counter((key, step) for key, step, _ in rows(database)).values()) == 1


def test_everything_arrives_with_nimg_as_step_and_compute_beside_the_evaluations(
    run: Path, tracker: Tracker, database: Path
) -> None:
    sync_run(run, tracker)
    steps: dict[str, list[int]] = {}
    for key, step, _ in rows(database):
        steps.setdefault(key, []).append(step)
    assert steps["train/loss"] == steps["train/compute"] == list(range(100, 1100, 100))
    assert steps["compute"] == steps["nll/test"] == steps["nll/train"] == steps["nll/test_stderr"] == [200, 1000]
    assert ("compute", 1000, 1000 * FLOPS) in rows(database)


def test_the_copy_by_compute_has_gflop_as_its_step(run: Path, tracker: Tracker, database: Path) -> None:
    big = eval_record(20_000)  # 4e12 FLOPs
    write_eval(run, big)
    sync_run(run, tracker)
    assert ("nll/test by GFLOP", 4000, big.value) in rows(database)


def test_config_and_tags_describe_the_run_without_credentials(run: Path, tracker: Tracker) -> None:
    run_id = sync_run(run, tracker)
    assert run_id is not None
    data = tracker.client.get_run(run_id).data
    assert data.params["model.channels"] == "8"
    assert data.params["model.mult"] == "[1, 2]"
    assert not any("secret" in value for value in data.params.values())
    assert (data.tags["size"], data.tags["study"], data.tags["seed"]) == ("C=8", "s", "0")


def test_a_replay_adds_nothing(run: Path, tracker: Tracker, database: Path) -> None:
    sync_run(run, tracker)
    before = rows(database)
    sync_run(run, tracker)
    assert rows(database) == before


def test_a_replay_without_its_cursor_adds_nothing(run: Path, tracker: Tracker, database: Path) -> None:
    sync_run(run, tracker)
    before = rows(database)
    (run / tracker.cursor_name).unlink()
    sync_run(run, tracker)
    assert rows(database) == before
    assert len(tracker.find_runs({"run_id": "unique"})) == 1


def test_what_was_half_sent_is_completed(run: Path, tracker: Tracker, database: Path) -> None:
    """A batch that arrived in part: the cursor was not written, and the store drops what it has."""
    started = tracker.open_run("unique", "C=8", None).info.run_id
    records = [TrainRecord(n, n * FLOPS, 1000.0 + n, {"train/loss": 1.0 / n}) for n in (100, 200)]
    tracker.send(started, [*train_points(records[0]), *list(train_points(records[1]))[:1]])  # its compute is missing
    sync_run(run, tracker)
    assert no_step_twice(database)
    assert len([key for key, _, _ in rows(database) if key == "train/loss"]) == 10


def test_a_cursor_of_another_database_is_not_believed(run: Path, tracker: Tracker, database: Path) -> None:
    sync_run(run, tracker)
    cursor = json.loads((run / tracker.cursor_name).read_text())
    (run / tracker.cursor_name).write_text(
        json.dumps(cursor | {"run": "of a database that is gone", "train_nimg": 900})
    )
    before = rows(database)
    sync_run(run, tracker)
    assert rows(database) == before


def test_steps_repeated_after_a_resume_are_not_sent_again(run: Path, tracker: Tracker, database: Path) -> None:
    sync_run(run, tracker)
    write_records(run, 500, range(600, 1600, 100), time=9000.0, loss=2.0)  # rolled back to 500, went on to 1500
    for lost in (False, True):
        if lost:
            (run / tracker.cursor_name).unlink()
        sync_run(run, tracker)
        assert no_step_twice(database)
        assert [step for key, step, _ in rows(database) if key == "train/loss"] == list(range(100, 1600, 100))


def test_later_evaluations_are_added(run: Path, tracker: Tracker, database: Path) -> None:
    sync_run(run, tracker)
    write_eval(run, eval_record(400))
    write_eval(run, EvalRecord.from_json(eval_record(1000).to_json() | {"metric": "fd_x", "stderr": None}), key="fd")
    sync_run(run, tracker)
    assert no_step_twice(database)
    assert [step for key, step, _ in rows(database) if key == "compute"] == [200, 400, 1000]
    assert [step for key, step, _ in rows(database) if key == "fd_x/test"] == [1000]


def test_a_complete_run_is_finished_in_the_ui(run: Path, tracker: Tracker) -> None:
    run_id = str(sync_run(run, tracker))
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    (run / "result.json").write_text("{}")
    sync_run(run, tracker)
    assert tracker.client.get_run(run_id).info.status == "FINISHED"


def test_samples_and_config_become_artifacts(run: Path, tracker: Tracker) -> None:
    (run / "samples").mkdir()
    (run / "samples" / "000000000200.png").write_bytes(b"png")
    run_id = str(sync_run(run, tracker))
    assert [f.path for f in tracker.client.list_artifacts(run_id, "samples")] == ["samples/000000000200.png"]
    assert "config.yaml" in [f.path for f in tracker.client.list_artifacts(run_id)]


def fit(law_id: str, form: str, exponent: float) -> LawRun:
    curve = [[1e9, 8.0], [1e10, 6.0]]
    return LawRun(
        law_id, f"law nll/test: {form}", "s", 1.0, {"exponent": exponent}, {"status": "ok"},
        {"kind": "law", "form": form}, {"nll/test": curve}, {"fit.json": {"form": form}},
    )  # fmt: skip


def law(folder: Path, *fits: LawRun) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "points.csv").write_text("x\n")
    save_law_runs(folder, [*fits, LawRun("s-report", "report", "s", 1.0, tags={"kind": "report"}, carries_files=True)])
    return folder


def test_every_fit_is_a_run_and_a_changed_one_takes_the_place_of_the_older(tmp_path: Path, tracker: Tracker) -> None:
    folder = law(tmp_path / "law", fit("law-1", "power", 0.1), fit("law-2", "broken", 0.2))
    power, broken, report = sync_law(folder, tracker)
    assert sync_law(folder, tracker) == [power, broken, report]
    law(folder, fit("law-1", "power", 0.1), fit("law-3", "broken", 0.3))
    newer = sync_law(folder, tracker)
    assert (newer[0], newer[2]) == (power, report)
    runs = {r.info.run_id: r.data for r in tracker.find_runs({"kind": "law"})}
    assert {run_id: data.metrics["exponent"] for run_id, data in runs.items()} == {power: 0.1, newer[1]: 0.3}
    history = tracker.client.get_metric_history(newer[1], "nll/test")
    assert [(m.step, m.value) for m in history] == [(0, 8.0), (1, 6.0)]
    assert [m.value for m in tracker.client.get_metric_history(power, "compute")] == [1e9, 1e10]
    assert [f.path for f in tracker.client.list_artifacts(power)] == ["fit.json"]
    assert {"points.csv", "law_runs.json"} <= {f.path for f in tracker.client.list_artifacts(report)}


def test_a_fit_keeps_its_time_and_a_new_one_gets_its_own(tmp_path: Path) -> None:
    save_law_runs(tmp_path, [LawRun("a", "law", "s", 0.0)])
    (first,) = load_law_runs(tmp_path)
    save_law_runs(tmp_path, [LawRun("b", "law", "s", 0.0), LawRun("a", "law", "s", 0.0)])
    new, same = load_law_runs(tmp_path)
    assert same == first
    assert new.time > first.time > 0


def test_a_study_folder_is_sent_whole_and_unchanged_parts_are_left_out(run: Path, tracker: Tracker) -> None:
    study = run.parent.parent
    law(study / "law", fit("law-1", "power", 0.1))
    seen: dict[Path, tuple[object, ...]] = {}
    assert not sync_folder(study, tracker, seen)
    assert {r.info.run_name for r in tracker.find_runs({"study": "s"})} == {"C=8", "law nll/test: power", "report"}
    marks = dict(seen)
    sync_folder(study, tracker, seen)
    assert seen == marks


def test_the_studys_page_arrives_with_the_ids_that_only_the_tracker_knows(
    run: Path, tracker: Tracker, database: Path
) -> None:
    study = run.parent.parent
    (study / "experiment.json").write_text(json.dumps(experiment_tags("s", ["nll/test"])))
    seen: dict[Path, Any] = {}
    sync_folder(study, tracker, seen)
    law(study / "law", fit("law-1", "power", 0.1))
    sync_folder(study, tracker, seen)
    tags = tracker.client.get_experiment(tracker.experiment_id).tags
    (report,) = tracker.find_runs({"kind": "report"})
    assert f"#/experiments/{tracker.experiment_id}/runs/{report.info.run_id}/artifacts/report.html" in tags[NOTE_TAG]
    assert f"#/experiments/{tracker.experiment_id}/runs?viewStateShareKey=scaling" in tags[NOTE_TAG]
    (pages,) = experiment_pages(f"sqlite:///{database}", "s")
    assert set(pages.views) == {"scaling", "training", "throughput", "trials", "fits"}
    assert pages.report_run == report.info.run_id
    assert {"points.csv", "law_runs.json"} <= set(pages.report_files)


def test_two_first_uses_of_a_database_at_once(run: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    command = [sys.executable, "-m", "trainer.tracking.mlflow_sync", str(run), "--tracking-uri", uri]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert no_step_twice(tmp_path / "new" / "mlflow.db")


def test_a_tracker_that_is_down_is_a_message_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError) as caught:
        connect("http://somebody:hunter22@127.0.0.1:9/", "s", attempts=1)
    assert "127.0.0.1:9" in str(caught.value)
    assert "does not answer" in str(caught.value)
    assert "hunter22" not in str(caught.value)
    assert "somebody" not in str(caught.value)


def test_a_tracker_that_refuses_us_says_what_to_set() -> None:
    refused = OSError("API request failed with error code 401 != 200. Response body: hunter22")
    with pytest.raises(DataError) as caught, require_answer("http://somebody:hunter22@host", DataError):
        raise refused
    assert "MLflow at http://***@host does not let us in: set MLFLOW_TRACKING_USERNAME" in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_following_survives_failures_reports_each_series_once_and_makes_a_last_pass() -> None:
    outcomes = iter([OSError("down"), OSError("down"), False, OSError("again"), False, False])
    passes, reports = [], []

    def one_pass() -> bool:
        outcome = next(outcomes)
        passes.append(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    import trainer.tracking.follow as module

    pauses: list[float] = []
    original = module._sleep
    module._sleep = lambda seconds, stopping: pauses.append(seconds)
    try:
        follow(one_pass, report=lambda e: reports.append(e and str(e)), stop=lambda: len(passes) == 5, poll_seconds=3.0)
    finally:
        module._sleep = original
    assert len(passes) == 6
    assert reports == ["down", None, "again", None]
    assert pauses == [1.0, 2.0, 3.0, 1.0, 3.0]


def test_redaction() -> None:
    assert redact("cannot reach http://me:pass@host/x") == "cannot reach http://***@host/x"
    assert redact("bad password hunter22", "https://me:hunter22@host") == "bad password ***"


def test_flatten_leaves_out_what_may_hold_credentials() -> None:
    flat = flatten({"a": {"b": 1, "c": [1, 2]}, "tracking": {"uri": "x", "api_token": "y"}, "d": None, "e": {}})
    assert flat == {"a.b": "1", "a.c": "[1, 2]", "d": "null", "e": "{}"}


def test_of_two_evaluations_at_one_point_the_latest_counts() -> None:
    points = eval_points([eval_record(100, time=900.0, value=2.0), eval_record(100, time=100.0, value=9.0)])
    assert points["nll/test", 100][-1].value == pytest.approx(3.0)


def test_names_of_guided_samples_fit_into_the_store(run: Path, tracker: Tracker, database: Path) -> None:
    """They name the classifier by its first digits; one that is too long all the same is cut, and stays apart."""
    usual = {"sampler": "ddim", "respacing": "50", "guidance": 1.0, "eta": 0.0, "weights": "ema"}
    guided = {"sampler": "dpmpp_2m", "respacing": "logsnr20", "classifier_sha256": "1234567890abcdef" * 4,
              "classifier_config_sha256": "fedcba0987654321" * 4, "classifier_scale": 4.0}  # fmt: skip
    ways = [{}, guided, *({"weights": letter, "notes": "long" * 60 + letter} for letter in "ab")]
    for number, way in enumerate(ways):
        record = dataclasses.replace(
            eval_record(200, value=float(number)), metric="fd_efflite0", n=50_000 if number else 2048,
            measured={**usual, **way}, time=600.0 + number,
        )  # fmt: skip
        write_eval(run, record, key=f"fd{number}")
    sync_run(run, tracker)
    found = {key: value for key, step, value in rows(database) if key.startswith("fd_") and step == 200}
    names = [key for key in found if not key.endswith("_stderr")]
    words = "classifier 12345678 - classifier_scale 4.0 - n 50000 - respacing logsnr20 - sampler dpmpp_2m"
    assert {"fd_efflite0/test", f"fd_efflite0/test - {words}"} < set(names)
    cut = [name for name in names if len(name) == LONGEST_KEY]
    assert len(names) == 4
    assert len({name[:-8] for name in cut}) == 1
    assert len(cut) == 2
    before = rows(database)
    (run / tracker.cursor_name).unlink()
    sync_run(run, tracker)
    assert rows(database) == before


def test_a_reconstructed_average_is_apart_from_the_tracked_one() -> None:
    tracked = dataclasses.replace(eval_record(100), measured={"weights": "power_0.1"})
    made = dataclasses.replace(tracked, details={"reconstructed": {"profile_error": 0.2, "num_snapshots": 6}})
    usual = "nll/test - weights power_0.1"
    for records in ([tracked, made], [made, tracked]):
        assert {key for key, _ in eval_points(records)} == {usual, "nll/test - reconstructed True - weights power_0.1"}


def test_infinity_is_not_drawn() -> None:
    point = next(train_points(TrainRecord(1, 1.0, 1.0, {"train/loss": float("inf")})))
    assert point.value != point.value


def test_what_was_measured_in_another_way_has_another_name(run: Path, tracker: Tracker, database: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"mode": "exact"}, {"weights": "model"}, {"respacing": "10,15"}, {"clip_denoised": False},
        {"ensemble_below": 5},
    ]  # fmt: skip
    for number, measured in enumerate(ways):
        other = dataclasses.replace(eval_record(1000, time=600.0 + number, value=9.0), measured=measured)
        write_eval(run, other, key=f"other{number}")
    for n in (100, 200):
        distance = dataclasses.replace(
            eval_record(1000, time=700.0 + n), metric="fd_efflite0", n=n, measured={"sampler": "ddim"}
        )
        write_eval(run, distance, key=f"distance{n}")
    sync_run(run, tracker)
    found = {key: value for key, step, value in rows(database) if step == 1000 and not key.endswith("_stderr")}
    assert found["nll/test"] == eval_record(1000).value
    names = {key for key in found if key.startswith("nll/test - ")}
    assert names == {
        "nll/test - mode exact", "nll/test - weights model", "nll/test - respacing 10_15",
        "nll/test - clip_denoised False", "nll/test - ensemble_below 5",
    }  # fmt: skip
    assert {"fd_efflite0/test", "fd_efflite0/test - n 200"} <= found.keys()


def test_an_evaluations_pictures_and_the_table_arrive(run: Path, tracker: Tracker) -> None:
    folder = run / "evals" / "000000001000"
    (folder / "k").mkdir()
    (folder / "k" / "nll_per_t.png").write_bytes(b"png")
    named = json.loads((folder / "k.json").read_text()) | {"name": "nll test abc"}
    (folder / "k.json").write_text(json.dumps(named))
    (run / "evals" / "metrics.txt").write_text("table")
    run_id = sync_run(run, tracker)
    assert run_id is not None
    there = tracker.client.list_artifacts(run_id, "evals")
    assert sorted(item.path for item in there) == ["evals/000000001000", "evals/metrics.txt"]
    (picture,) = tracker.client.list_artifacts(run_id, "evals/000000001000/nll test abc")
    assert picture.path.endswith("nll_per_t.png")


def test_data_sets_are_inputs_of_the_run_once(run: Path, tracker: Tracker) -> None:
    config = {"model": {"image_size": 32}, "data": {"train": "s3://key:secret99@bucket/cifar/train?sig=secret99"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"data_fingerprint": "f" * 64}))
    for nimg, key in ((400, "a"), (1000, "k")):
        write_eval(run, eval_record(nimg), key=key)
        path = run / "evals" / f"{nimg:012d}" / f"{key}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"spec": {"data": "data/cifar/test"}}))
    for lost in (False, True):
        if lost:
            (run / tracker.cursor_name).unlink()
        run_id = str(sync_run(run, tracker))
        inputs = tracker.client.get_run(run_id).inputs.dataset_inputs
        found = {(i.dataset.name, i.dataset.digest, i.dataset.source_type, i.tags[0].value) for i in inputs}
        assert found == {("cifar/train", "f" * 32, "s3", "train"), ("cifar/test", "d", "local", "eval")}
        assert len(inputs) == 2
        assert not any("secret99" in json.dumps(i.to_dictionary()) for i in inputs)
    assert tracker.client.get_run(run_id).data.params["data.train"] == "s3://bucket/cifar/train"


def test_the_config_that_is_uploaded_names_no_credentials(run: Path, tracker: Tracker, tmp_path: Path) -> None:
    run_id = str(sync_run(run, tracker))
    text = Path(tracker.client.download_artifacts(run_id, "config.yaml", str(tmp_path))).read_text()
    assert yaml.safe_load(text) == {"model": {"channels": 8, "mult": [1, 2]}, "tracking": {}}


def test_only_new_bytes_are_read(run: Path) -> None:
    records, place = read_new_train_records(run, Place())
    assert [record.nimg for record in records] == list(range(100, 1100, 100))
    path = run / "metrics.0.jsonl"
    line = json.dumps(dataclasses.asdict(dataclasses.replace(records[-1], nimg=1100)))
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)  # still being written
    assert read_new_train_records(run, place) == ([], place)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")
    more, behind = read_new_train_records(run, place)
    assert ([record.nimg for record in more], behind.offset) == ([1100], path.stat().st_size)
    path.write_text("x" * 100 + path.read_text()[100:])  # what was read before is not looked at again
    assert read_new_train_records(run, behind) == ([], behind)


@pytest.mark.parametrize("start", [0, 500])
def test_a_segment_that_was_begun_anew_is_read_from_its_start(run: Path, start: int) -> None:
    _, place = read_new_train_records(run, Place())
    write_records(run, start, range(start + 100, start + 2100, 100), time=9000.0, loss=2.0)
    records, behind = read_new_train_records(run, place)
    assert [record.nimg for record in records][-20:] == list(range(start + 100, start + 2100, 100))
    assert behind.segment == start
    assert read_new_train_records(run, behind) == ([], behind)


def test_runs_are_found_over_all_pages(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.tracking.mlflow_store._MAX_RUNS", 2)
    names = {f"it's run {number}" for number in range(5)}
    for name in names:
        tracker.open_run(name, name, None)
    assert {run.info.run_name for run in search_runs(tracker.client, tracker.experiment_id)} == names
    assert tracker.open_run("it's run 3", "again", None).info.run_name == "it's run 3"


def test_files_of_the_law_that_come_later_are_sent_too_and_the_others_not_again(
    run: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run.parent.parent
    law(study / "law", fit("law-1", "power", 0.1))
    seen: dict[Path, Any] = {}
    sync_folder(study, tracker, seen)
    (study / "law" / "figures").mkdir()
    (study / "law" / "figures" / "a.png").write_bytes(b"png")
    (study / "law" / "report.html").write_text("<p>")
    uploads: list[tuple[str, str | None]] = []
    original = tracker.client.log_artifact

    def log_artifact(run_id: str, path: str, folder: str | None = None) -> None:
        uploads.append((Path(path).name, folder))
        original(run_id, path, folder)

    monkeypatch.setattr(tracker.client, "log_artifact", log_artifact)
    sync_folder(study, tracker, seen)
    assert sorted(uploads) == [("a.png", "figures"), ("report.html", None)]
    sync_folder(study, tracker, {})
    assert len(uploads) == 2
