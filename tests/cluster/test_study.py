"""A whole study on a real local Ray, with real training, evaluation and MLflow: killed, continued, repeated."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[[Path, Path], "subprocess.Popen[bytes]"]
ROOT = Path(__file__).resolve().parents[2]

STUDY = """
name: twosizes
run: tiny.yaml
ladder: {{key: model.channels, values: [4, 8], label: "C={{value}}"}}
settings: {{model.num_heads: 2, train.log_every_images: 64}}
budget: {{images: 1536}}
evaluation:
  test: {data}/test
  images: [512, 1024]
  nll: {{splits: [test, train], num_calls: 128}}
  distance: {{num_samples: 8, respacing: 2}}
resources: {{eval_shards: 2}}
device: {{peak_flops: 1.0e+11, utilization: 0.1}}
"""


@pytest.fixture
def study_file(tmp_path: Path, tiny_config: Path, generated_data: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(tiny_config.read_text())
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(data=generated_data))
    return path


def command(action: str, study: Path) -> list[str]:
    return [sys.executable, "-m", "cluster.study", action, str(study), "--out", str(study.parent / "out")]


def environment(study: Path) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{study.parent}/mlflow.db", "PYTHONUNBUFFERED": "1"}


def run(action: str, study: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(action, study), *more], cwd=ROOT, env=environment(study), capture_output=True, text=True, timeout=280
    )


@pytest.fixture
def start() -> Iterator[Callable[[Path, Path], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def begin(study: Path, log: Path) -> subprocess.Popen[bytes]:
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command("run", study), cwd=ROOT, env=environment(study), stdout=file, stderr=file
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for_training(out: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until every trial has begun and one has exported."""
    deadline = time.monotonic() + 200
    while not (list(out.glob("trials/*/exports/*/manifest.json")) and len(list(out.glob("trials/*/metrics.*"))) == 2):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def results(out: Path) -> dict[str, int]:
    files = [*out.glob("trials/*/result.json"), *out.glob("trials/*/evals/*/*.json"), *out.glob("trials/*/log.txt")]
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.timeout(600)
def test_a_study_survives_its_drivers_death_and_repeats_nothing(study_file: Path, tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    driver = start(study_file, tmp_path / "first.log")
    wait_for_training(out, driver, tmp_path / "first.log")
    driver.kill()
    driver.wait()
    saved = {path.parents[2].name for path in out.glob("trials/*/checkpoints/*/manifest.json")}
    assert saved  # an export follows its checkpoint
    finished_before = {p: m for p, m in results(out).items() if not p.endswith("log.txt")}

    second = run("run", study_file)
    assert second.returncode == 0, second.stdout + second.stderr
    for name in ("channels4-seed0", "channels8-seed0"):
        folder = out / "trials" / name
        assert json.loads((folder / "result.json").read_text())["nimg"] == 1536
        assert sorted(p.name for p in (folder / "exports").iterdir()) == [f"{n:012d}" for n in (512, 1024, 1536)]
        assert [len(list((folder / "evals" / f"{n:012d}").glob("*.json"))) for n in (512, 1024, 1536)] == [2, 2, 3]
        lives = (folder / "log.txt").read_text().count("process(es)")
        resumed = (folder / "log.txt").read_text().count("resuming at")
        assert resumed == lives - 1 or name not in saved  # what was saved is not trained again
    after = results(out)
    assert all(after[path] == mark for path, mark in finished_before.items())
    assert "NLL (bits/dim) on held-out images" in second.stdout
    assert "N = 8, ddim sampler, respacing 2" in second.stdout
    assert (out / "law" / "nll_test.png").stat().st_size > 10_000
    assert (out / "law" / "points.csv").read_text().count("\n") == 1 + 2 * (3 * 3 + 1)  # nll test, train, gap; fd
    check_mlflow(tmp_path / "mlflow.db", second.stdout)

    before = results(out)
    third = run("run", study_file)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "done already" in third.stdout
    assert "starting Ray" not in third.stdout
    assert results(out) == before
    check_mlflow(tmp_path / "mlflow.db", third.stdout)
    status = run("status", study_file)
    assert len(re.findall(r"^channels\d-seed0 .* complete ", status.stdout, re.MULTILINE)) == 2
    assert status.stdout.count("7/7") == 2


def check_mlflow(database: Path, printed: str) -> None:
    """Two trials, the fits and the report are runs of their own; no point twice; what to look at has its address."""
    with sqlite3.connect(database) as connection:
        runs = connection.execute("select run_uuid, name from runs where lifecycle_stage='active'").fetchall()
        names = sorted(name for _, name in runs)
        assert [name for name in names if not name.startswith("law ")] == ["C=4", "C=8", "report"]
        assert {"law nll/test: a C^-b", "law nll/test: c + a C^-b"} <= set(names)
        nested = connection.execute("select count(*) from tags where key='mlflow.parentRunId'").fetchone()[0]
        assert nested == 0
        twice = connection.execute(
            "select key, step, count(*) n from metrics where key not like '%GFLOP' group by run_uuid, key, step "
            "having n > 1"
        ).fetchall()
        assert twice == []
        found = dict(
            connection.execute(
                "select key, count(*) from metrics join runs using (run_uuid) where name like 'C=%' group by key"
            ).fetchall()
        )
        assert (found["nll/train"], found["fd_efflite0/test"]) == (6, 2)
        views = connection.execute("select experiment_id, key from experiment_tags where key like '%View%'").fetchall()
        (report,) = connection.execute("select run_uuid from runs where name = 'report'").fetchone()
    assert {key.rpartition(".")[2] for _, key in views} == {"scaling", "training", "throughput", "trials", "fits"}
    shown = printed.splitlines()[-6:]
    for (experiment, key), line in zip(views, sorted(shown[:5]), strict=True):
        assert f"#/experiments/{experiment}/runs?viewStateShareKey=" in line, key
    assert f"/runs/{report}/artifacts/report.html" in shown[-1]


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_a_stopped_study_saves_and_says_how_to_continue(study_file: Path, tmp_path: Path, start: Start) -> None:
    log = tmp_path / "first.log"
    driver = start(study_file, log)
    wait_for_training(tmp_path / "out", driver, log)
    second = run("run", study_file)
    assert second.returncode == 2
    assert "is being driven by process" in second.stderr
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(90) == 130
    assert "To continue: python -m cluster.study run" in log.read_text()
    for folder in (tmp_path / "out" / "trials").iterdir():
        assert (folder / "result.json").exists() or list((folder / "checkpoints").iterdir())
    assert run("run", study_file).returncode == 0


def test_mistakes_are_said_before_anything_starts(study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(text.replace("evaluation:\n  test: ", "evaluation:\n  test: /nowhere"))
    missing = run("run", study_file)
    assert missing.returncode == 2
    assert "/nowhere" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert "starting Ray" not in missing.stdout
    study_file.write_text(text)
    nobody = run("run", study_file, "--address", "127.0.0.1:9")
    assert nobody.returncode == 2
    assert "nothing answers at --address 127.0.0.1:9" in nobody.stderr
    study_file.write_text(text.replace("num_heads: 2", "num_heads: 3"))
    wrong = run("plan", study_file)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "trial channels4" in wrong.stderr
