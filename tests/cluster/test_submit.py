"""Submission: what travels to the cluster, what is refused, and Ray's client against a job server that misbehaves."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import submit
from cluster.definition.spec import load_study
from cluster.launch import job_server
from cluster.launch.job_server import JobServer
from cluster.submit import submit_study, write_package
from data_pipeline.errors import UserError
from trainer.config.run import load_config
from trainer.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
STUDY = """
name: outside
run: {run}
ladder: {{key: model.channels, values: [4, 8], label: "C={{value}}"}}
settings: {{model.num_heads: 2, train.log_every_images: 128}}
budget: {{images: 1024}}
evaluation: {{test: data/test, images: [512], nll: {{splits: [test], num_calls: 128}}}}
tracking: {{mlflow: false}}
"""


@pytest.fixture
def study_file(tmp_path: Path, tiny_config: Path) -> Path:
    """A study outside the repository, whose run config inherits from one elsewhere."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.yaml").write_text(f"base: {tiny_config}\ntrain: {{lr: 2.0e-3}}\n")
    (folder / "study.yaml").write_text(STUDY.format(run="run.yaml"))
    return folder / "study.yaml"


# ---- what is sent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_package_holds_the_same_study(tmp_path: Path, path: Path) -> None:
    study = load_study(path, ["seeds=[3,4]"])
    sent = load_study(tmp_path / write_package(study, tmp_path))
    assert sent.model_dump(exclude={"run", "extra"}) == study.model_dump(exclude={"run", "extra"})
    for mine, other in zip((study, *study.extra), (sent, *sent.extra), strict=True):
        assert other.run.parent == tmp_path / "submitted" / study.name
        assert load_config(other.run) == load_config(mine.run)


def test_a_package_holds_the_code_and_nothing_private(tmp_path: Path, study_file: Path) -> None:
    write_package(load_study(study_file), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"cluster", "data_pipeline", "evaluation", "trainer", "configs", "pyproject.toml", "submitted"} <= names
    assert not names & {"data", "runs", ".git", ".venv"}
    assert [name for name in names if name.startswith(".")] == [".gitignore"]


def test_passwords_in_a_study_are_refused_with_their_key(tmp_path: Path, study_file: Path) -> None:
    study = load_study(study_file, ["tracking.uri=http://me:hunter2@tracker:5000"])
    with pytest.raises(UserError, match=r"'uri'.*MLFLOW_TRACKING_URI") as error:
        write_package(study, tmp_path)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"address": "auto", "out": Path("/out")}, "no address of a job server"),
        ({"address": "ray://head:10001", "out": Path("/out")}, "no address of a job server"),
        ({"address": "http://me:hunter2@head:8265", "out": Path("/out")}, "holds a password"),
        ({"root": Path("shared")}, "--root shared is relative"),
        ({}, "needs --root"),
        ({"out": Path("runs/here")}, "needs --root"),
        ({"out": Path("/out"), "env": ["TOKEN=hunter2"]}, "the variable's name alone"),
        ({"out": Path("/out"), "env": ["NO_SUCH_VARIABLE_HERE"]}, "no such variable"),
        ({"out": Path("/out"), "overrides": ["budget.imges=3"]}, "budget.imges"),
        ({"out": Path("/out"), "overrides": ["model.channels=3"]}, "model"),
        ({"out": Path("/out")}, "nothing answers at --address http://127.0.0.1:"),
    ],
)
def test_mistakes_are_said_before_anything_is_sent(study_file: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        submit_study(study_file, **{"address": f"http://127.0.0.1:{free_port()}"} | arguments)
    assert "hunter2" not in str(error.value)


# ---- Ray's client against a stand-in of the job server --------------------------------------------------------------


class Stub:
    """Answers as Ray's job server does, or as it should not."""

    def __init__(self) -> None:
        self.busy = 0  # so many requests are answered with 500
        self.always: tuple[int, str] | None = None
        self.states: list[dict[str, Any]] = [{"status": "RUNNING"}]
        self.job: dict[str, Any] = {}
        self.package = b""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        if self.always is not None:
            return self.always
        if self.busy:
            self.busy -= 1
            return 500, "No available agent to submit job, please try again later."
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": "2.50.0", "ray_commit": "x", "session_name": "s"})
        if path.startswith("/api/packages/"):
            self.package = body or self.package
            return (200, "{}") if self.package else (404, "")
        if method == "POST":
            if self.job:
                return 400, "ValueError: Job with submission_id x already exists."
            self.job = json.loads(body)
            return 200, json.dumps({"job_id": "1", "submission_id": self.job["submission_id"]})
        if path.endswith("/logs"):
            return 200, json.dumps({"logs": "first\nerror: no such data\n"})
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return 200, json.dumps({"type": "SUBMISSION", "entrypoint": "python"} | state)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stub, str]]:
    state = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, text = state.answer(self.command, self.path, body)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(job_server, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_WATCH_SECONDS", 0.2)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # restored after the test, which sets it
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")  # Ray would put it before the argument
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_submission(
    stub: tuple[Stub, str], study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, address = stub
    server.busy = 2
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@tracker:5000")
    arguments: dict[str, Any] = {"address": address, "root": Path("/shared dir"), "env": ["SECRET"]}
    code = submit_study(study_file, **arguments, overrides=["budget.images=2048", "tracking.mlflow=true"])
    said = capsys.readouterr().out

    assert code == 0
    job = server.job
    assert job["submission_id"].startswith("outside-")
    command = "exec python -m cluster.study run submitted/outside/study.yaml --address auto --root '/shared dir'"
    assert job["entrypoint"] == command
    assert job["runtime_env"]["env_vars"] == {"SECRET": "hunter2", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert "hunter2" not in said
    for words in (
        f"ray job logs {job['submission_id']} --address {address}", f"ray job stop {job['submission_id']}",
        "tracking.mlflow=true --out '/shared dir/runs/outside'", "2.50.0 on the cluster",
        "--env MLFLOW_TRACKING_URI sends it",
    ):  # fmt: skip
        assert words in said
    with zipfile.ZipFile(io.BytesIO(server.package)) as package:
        names = package.namelist()
        assert "budget:\n  images: 2048" in package.read("submitted/outside/study.yaml").decode().replace(
            "  flops: null\n", ""
        )
    assert {"cluster/study.py", "trainer/run.py", "submitted/outside/study.run.yaml"} <= set(names)
    unwanted = (".git/", ".venv/", "data/", "runs/")
    assert not [name for name in names if name.startswith(unwanted) or "__pycache__" in name]


def test_an_attempt_whose_answer_was_lost_is_not_made_twice(stub: tuple[Stub, str], tmp_path: Path) -> None:
    server, address = stub
    for _ in range(2):
        JobServer(address).submit("one", "true", working_dir=tmp_path, environment={})
    assert server.job["submission_id"] == "one"


@pytest.mark.parametrize(
    ("code", "text", "says"),
    [
        (401, "Unauthorized: Missing authentication token", "RAY_AUTH_MODE=token"),
        (403, "Forbidden: Invalid authentication token", "RAY_AUTH_TOKEN"),
        (404, "no such page", "not a Ray job server"),
        (200, "<html>", "not a Ray job server"),
        (200, '{"ray_version": "1.8.0"}', "refused: .*1.9 or higher"),
        (500, "No available agent", "is not ready after 0 s"),
    ],
)
def test_a_server_that_refuses(stub: tuple[Stub, str], code: int, text: str, says: str) -> None:
    server, address = stub
    server.always = code, text
    with pytest.raises(UserError, match=says):
        JobServer(address, patience=0.0)


@pytest.mark.parametrize(
    ("states", "code", "says"),
    [
        ([{"status": "PENDING"}, {"status": "RUNNING"}], 0, "it has been running for"),
        ([{"status": "RUNNING"}, {"status": "FAILED", "driver_exit_code": 2}], 2, "error: no such data"),
        ([{"status": "SUCCEEDED", "driver_exit_code": 0}], 0, "it has ended"),
        ([{"status": "STOPPED"}], 130, "it has ended"),
        ([{"status": "FAILED", "message": "no node"}], None, "could not be started: no node"),
    ],
)
def test_the_start_is_watched(
    stub: tuple[Stub, str], study_file: Path, capsys: pytest.CaptureFixture[str],
    states: list[dict[str, Any]], code: int | None, says: str,
) -> None:  # fmt: skip
    server, address = stub
    server.states = states
    if code is None:
        with pytest.raises(UserError, match=says):
            submit_study(study_file, address=address, out=Path("/out"))
    else:
        assert submit_study(study_file, address=address, out=Path("/out")) == code
        assert says in capsys.readouterr().out


# ---- a real head ----------------------------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the job server of a real Ray head of its own, which wants a token."""
    for name, value in {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    ports = [free_port() for _ in range(4)]
    options = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"]
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.2", "--num-cpus=2"]
    command += [f"--{option}={port}" for option, port in zip(options, ports, strict=True)]
    session = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, and their paths must be short
    command += [f"--temp-dir={session}", "--object-store-memory=100000000"]
    with open(tmp_path / "head.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not answers(ports[1]):  # and no longer: it is submit that waits until the server is ready
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(session, ignore_errors=True)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def wait_for(server: JobServer, job: str, done: Any) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert time.monotonic() < deadline, server.log(job)
        time.sleep(0.5)


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_studies_on_a_real_head(
    head: str, tmp_path: Path, generated_data: Path, tiny_config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Submitted while the head is still starting; stopped, which saves; and again, which goes on to the end."""
    folder, root = tmp_path / "mine", tmp_path / "shared"
    folder.mkdir()
    root.mkdir()
    (root / "generated").symlink_to(generated_data)
    (folder / "run.yaml").write_text(f"base: {tiny_config}\ndata: {{train: generated/train}}\n")
    study, out = folder / "study.yaml", root / "runs" / "outside"
    text = STUDY.format(run="run.yaml").replace("data/test", "generated/test")
    study.write_text(text.replace("images: 1024", "images: 4096"))

    assert submit_study(study, address=head, root=root) == 0
    job = capfd.readouterr().out.split("as job ")[1].split()[0]
    server = JobServer(head)
    wait_for(server, job, lambda: list(out.glob("trials/*/exports/*/manifest.json")))
    assert subprocess.run(["ray", "job", "stop", job, "--address", head], capture_output=True).returncode == 0
    wait_for(server, job, lambda: server.state(job).ended)
    assert server.state(job).status == "STOPPED"
    assert "stopped; what was running is saved" in server.log(job)
    saved = {path.name for path in out.glob("trials/*/checkpoints/*")} - {"000000000512"}
    assert saved

    command = [sys.executable, "-m", "cluster.study", "submit", str(study), "--address", head]
    done = subprocess.run([*command, "--root", str(root), "--follow"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluated" in done.stdout
    assert len(list(out.glob("trials/*/result.json"))) == 2
    assert (out / "law" / "points.csv").exists()
    wrong = ["evaluation.test=/nowhere/test"]
    assert submit_study(study, address=head, out=tmp_path / "no", overrides=wrong) == 2
    assert "error: there is no folder /nowhere/test" in capfd.readouterr().out


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_plain_ray_job_submit(head: str, tmp_path: Path, generated_data: Path, tiny_config: Path) -> None:
    """The study's file lies where the nodes see it; the code is the repository's, as `--working-dir` sent it."""
    (tmp_path / "study.yaml").write_text(STUDY.format(run=tiny_config).replace("data/test", f"{generated_data}/test"))
    JobServer(head)  # waits until it is ready
    command = ["ray", "job", "submit", "--address", head, "--working-dir", ".", "--", "python", "-m", "cluster.study"]
    command += ["run", f"{tmp_path}/study.yaml", "--address", "auto", "--out", f"{tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "out").glob("trials/*/result.json"))) == 2
