"""The UI's command and a tracking server, without a browser: what is printed, answered and refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_records import eval_record, write_eval, write_records

from cluster.tracking import server_address, server_command, ui_command
from cluster.ui import wait_until_it_answers
from evaluation.report.mlflow_views import experiment_tags
from trainer.tracking.mlflow_store import connect
from trainer.tracking.mlflow_sync import sync_folder
from trainer.tracking.points import LawRun, save_law_runs

PAGE = "<h1>the report</h1>"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of one trial with its page and its report."""
    run = tmp_path / "s" / "trials" / "c8"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"id": "r", "name": "C=8", "num_params": 10, "tags": {"size": "C=8"}}))
    write_records(run, 0, range(100, 600, 100), time=1000.0)
    write_eval(run, eval_record(500))
    law = tmp_path / "s" / "law"
    law.mkdir()
    (law / "report.html").write_text(PAGE)
    save_law_runs(law, [LawRun("s-report", "report", "s", 1.0, tags={"kind": "report"}, carries_files=True)])
    (tmp_path / "s" / "experiment.json").write_text(json.dumps(experiment_tags("s", ["nll/test"])))
    return tmp_path / "s"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def ui(uri: str, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.ui", "--port", str(port), "--tracking-uri", uri]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def get(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=30) as answer:
        return str(answer.read().decode())


def test_the_ui_prints_every_address_once_the_server_answers_and_ends_with_it(
    study: Path, database: Path, port: int, started: list[subprocess.Popen[str]]
) -> None:
    uri = f"sqlite:///{database}"
    sync_folder(study, connect(uri, "s"), {})
    process = ui(uri, port)
    started.append(process)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(8)]
    assert lines[0] == f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C ends it)"
    assert lines[1] == "s:"
    names = [" ".join(line.split()[:-1]) for line in lines[2:]]
    assert sorted(names) == ["Fits", "Report", "Scaling curves", "Throughput", "Training", "Trials"]
    server = f"http://127.0.0.1:{port}"
    assert "MLflow" in get(server)  # it answers as soon as the addresses stand there
    report_run = lines[-1].partition("/artifacts/")[0].rpartition("/")[2]
    assert get(f"{server}/get-artifact?run_uuid={report_run}&path=report.html") == PAGE

    second = ui(uri, port)
    started.append(second)
    assert f"port {port} on 127.0.0.1 is in use" in second.communicate(timeout=60)[0]
    assert second.returncode == 2

    process.send_signal(signal.SIGTERM)
    process.wait(30)
    deadline = time.monotonic() + 10
    while not is_free(port):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.1)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_nothing_to_show_yet_is_a_message(tmp_path: Path, port: int, started: list[subprocess.Popen[str]]) -> None:
    process = ui(f"sqlite:///{tmp_path}/none.db", port)
    started.append(process)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "there is nothing to show yet" in text
    assert not (tmp_path / "none.db").exists()


def test_addresses_of_a_server_show_no_credentials() -> None:
    uri = "https://somebody:hunter22@mlflow.example.org/"
    assert server_address(uri) == "https://mlflow.example.org"
    assert ui_command(uri) == "open https://mlflow.example.org"
    assert ui_command("sqlite:///elsewhere.db", 5001) == (
        "python -m cluster.ui --tracking-uri sqlite:///elsewhere.db --port 5001"
    )


@pytest.mark.prove
def test_a_study_arrives_at_a_server_as_in_a_database(
    study: Path, database: Path, tmp_path: Path, port: int, started: list[subprocess.Popen[str]]
) -> None:
    command = [*server_command(f"sqlite:///{database}", port), "--artifacts-destination", str(tmp_path / "artifacts")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    started.append(process)
    wait_until_it_answers(process, port, tmp_path / "log")
    server = f"http://127.0.0.1:{port}"
    for _ in range(2):
        tracker = connect(server, "over http")
        sync_folder(study, tracker, {})
        (trial,) = tracker.find_runs({"kind": "trial"})
        assert len(tracker.client.get_metric_history(trial.info.run_id, "train/loss")) == 5
        (report,) = tracker.find_runs({"kind": "report"})
        assert get(f"{server}/get-artifact?run_uuid={report.info.run_id}&path=report.html") == PAGE
    assert "mlflow.sharedViewState.scaling" in tracker.client.get_experiment(tracker.experiment_id).tags
