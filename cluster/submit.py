"""Submit a study to a Ray cluster: this repository and the study travel there, and the head runs them as a job.

What is sent depends on nothing here afterwards: the study and its run configs are merged with their bases and with the
command line's `key=value`s, wherever their files lie.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from cluster.definition.portable import save_portable
from cluster.definition.spec import StudyConfig, load_study
from cluster.heartbeat import heartbeat
from cluster.launch.job_server import JobServer, JobState
from data_pipeline.errors import INTERRUPTED_EXIT, UserError

_ROOT = Path(__file__).resolve().parents[1]
_NOT_SENT = ("data", "runs", "venv", "build", "dist", "submitted", "__pycache__")  # and whatever .gitignore names
_STOP_SECONDS = 120  # from `ray job stop` to SIGKILL; Ray's own 3 s are too short to save in
_WATCH_SECONDS = 20.0  # most mistakes show in the first seconds of a study
_POLL_SECONDS = 0.5
_TAIL_LINES = 30
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def submit_study(
    study_file: Path,
    *,
    address: str,
    root: Path | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    env: Sequence[str] = (),
    follow: bool = False,
) -> int:
    """Send a study to the job server at `address` (http://HOST:8265), see it start, and say how to watch and stop it.

    `root`, `out`: folders on the cluster, as for `run`. `env`: names of environment variables to hand on. With `follow`
    the job's output is shown until it ends. Returns the exit code: the study's, where it ended in the meantime.

    Raises UserError for what is wrong with the study, the folders, the variables or the cluster.
    """
    _check_address(address)
    _check_folders(root, out)
    environment = _chosen(env) | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)}
    with heartbeat("reading the study"):
        from cluster.definition.trials import make_trials

        study = load_study(study_file, overrides)
        make_trials(study)  # what cannot be trained is said here, not in a log
    with heartbeat("sending the study"), tempfile.TemporaryDirectory(prefix="submit-") as name:
        server = JobServer(address)
        file = write_package(study, Path(name))
        job = f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        server.submit(job, _command(file, root, out), working_dir=Path(name), environment=environment)
    folder = PurePosixPath(root or "/") / (out or PurePosixPath("runs", study.name))
    status = shlex.join(["python", "-m", "cluster.study", "status", str(study_file), *overrides, "--out", str(folder)])
    print("\n".join([*_where_to_look(study.name, status, server, job), *_notes(study, server, env)]), flush=True)
    try:
        return _follow(server, job) if follow else _see_it_start(server, job)
    except KeyboardInterrupt:
        print("\nno longer watching; the study goes on", flush=True)
        return INTERRUPTED_EXIT


def write_package(study: StudyConfig, folder: Path) -> PurePosixPath:
    """Fill `folder` with links to the repository's parts and with the study; returns the study's path in it.

    Hidden files (.env, .git) are left out, and what .gitignore names is left out when the folder is sent. Raises
    UserError where there is no repository, or where a file would carry a password.
    """
    if not (_ROOT / "pyproject.toml").exists():
        raise UserError(f"{_ROOT} is not a checkout of the project: submit from one, whose code is then what runs.")
    for entry in _ROOT.iterdir():
        if entry.name == ".gitignore" or not (entry.name.startswith(".") or entry.name in _NOT_SENT):
            (folder / entry.name).symlink_to(entry)
    submitted = folder / "submitted" / study.name
    submitted.mkdir(parents=True)
    save_portable(study, submitted)
    _check_no_passwords(submitted)
    return PurePosixPath("submitted", study.name, "study.yaml")


def _command(file: PurePosixPath, root: Path | None, out: Path | None) -> str:
    words = ["python", "-m", "cluster.study", "run", str(file), "--address", "auto"]
    words += ["--root", str(root)] if root else []
    words += ["--out", str(out)] if out else []
    return "exec " + shlex.join(words)  # so that the signal that stops the job reaches the driver, not a shell


def _check_address(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--address {address} is no address of a job server: give the dashboard's, such as http://HOST:8265 "
            "(`run` is what takes auto, HOST:6379 and ray://HOST:10001)."
        )
    if parts.username or parts.password:
        raise UserError("--address holds a password, which would be printed and logged: use a token, RAY_AUTH_TOKEN.")


def _check_folders(root: Path | None, out: Path | None) -> None:
    if root is not None and not root.is_absolute():
        raise UserError(f"--root {root} is relative: give the path on the cluster, on storage that all nodes see.")
    if root is None and not (out is not None and out.is_absolute()):
        raise UserError(
            "submit needs --root DIR, the folder on storage that all nodes see in which relative paths (data/..., "
            "runs/...) begin; or an absolute --out where the study names its data by absolute paths or URLs."
        )


def _chosen(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(
                f"--env {name.partition('=')[0]}...: give the variable's name alone; its value is taken from the "
                "environment, for command lines are seen by others."
            )
        if name not in os.environ:
            raise UserError(f"--env {name}: no such variable is set here; export it, or set it on the nodes.")
    return {name: os.environ[name] for name in names}


def _check_no_passwords(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        found = _PASSWORD.search(path.read_text(encoding="utf-8"))
        if found:
            key = next(line.partition(":")[0].strip() for line in path.read_text().splitlines() if found[0] in line)
            raise UserError(
                f"the study holds an address with a password, at {key!r}; study files are sent, stored and shown. Give "
                "the address without it: for MLflow set MLFLOW_TRACKING_URI on the nodes, or hand it on by --env."
            )


def _where_to_look(name: str, status: str, server: JobServer, job: str) -> list[str]:
    return [
        f"submitted:  study {name} as job {job}",
        f"its output: ray job logs {job} --address {server.address} --follow",
        f"its state:  {status}   (where that storage is seen)",
        f"dashboard:  {server.address}",
        f"to stop it: ray job stop {job} --address {server.address}   (what is running saves first)",
        "to go on:   submit it again; nothing finished is repeated",
    ]


def _notes(study: StudyConfig, server: JobServer, env: Sequence[str]) -> list[str]:
    notes = []
    here, there = server.versions()
    if here != there:
        notes.append(f"note: Ray is {here} here and {there} on the cluster; the cluster's own environment is used.")
    unsent = "MLFLOW_TRACKING_URI" in os.environ and "MLFLOW_TRACKING_URI" not in env
    if unsent and study.tracking.mlflow and study.tracking.uri is None:
        notes.append("note: MLFLOW_TRACKING_URI is set here and was not sent; --env MLFLOW_TRACKING_URI sends it.")
    return notes


def _follow(server: JobServer, job: str) -> int:
    server.follow(job, lambda text: print(text, end="", flush=True))
    return _exit_code(server.state(job))


def _see_it_start(server: JobServer, job: str) -> int:
    with heartbeat("waiting for the study to start"):
        while (state := server.state(job)).status == "PENDING":
            time.sleep(_POLL_SECONDS)
    until = time.monotonic() + _WATCH_SECONDS
    while not state.ended and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        state = server.state(job)
    if not state.ended:
        print(f"it has been running for {_WATCH_SECONDS:.0f} s", flush=True)
        return 0
    print("\n".join(["it has ended:", *server.log(job).splitlines()[-_TAIL_LINES:]]), flush=True)
    return _exit_code(state)


def _exit_code(state: JobState) -> int:
    """The study's exit code. Raises UserError where the job never came to have one."""
    if not state.ended:
        raise UserError("the job's output ended before the job, which goes on; watch it as said above.")
    if state.status == "SUCCEEDED":
        return 0
    if state.exit_code is None:
        if state.status == "STOPPED":
            return INTERRUPTED_EXIT
        raise UserError(
            f"the job could not be started: {state.message.strip()} If a module is missing, start Ray on the nodes "
            "from the project's environment (`source .venv/bin/activate`)."
        )
    return state.exit_code
