"""A finished report in MLflow: trials, law, saved view; and where to look at them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cluster.folder import StudyFolder
from cluster.report import Report
from data_pipeline.errors import UserError
from evaluation.report.mlflow_views import scaling_view, view_address, view_tag
from trainer.tracking.uri import DEFAULT_URI, default_uri, redact, sqlite_file

UI_PORT = 5000


def send_report(folder: StudyFolder, report: Report) -> list[str]:
    """Send what MLflow lacks of the study. Returns the lines that say how to open it, or why it was not sent."""
    tracking = folder.study.tracking
    if not tracking.mlflow:
        return ["MLflow:        switched off in the study file (tracking.mlflow)"]
    uri = tracking.uri or default_uri()
    view = scaling_view(report.curves or ("nll/test",))
    try:
        now_ms = int(time.time() * 1000)
        experiment_id = _send(folder, uri, dict([view_tag(view, now_ms=now_ms), *_description(folder)]))
    except Exception as error:  # whatever the tracker says: the files are written, and they are the truth
        text = str(error) if isinstance(error, UserError) else f"{redact(uri)}: {redact(str(error), uri)[:300]}"
        return [f"warning: not sent to MLflow: {text}", f"report:        {os.path.relpath(folder.law / 'report.txt')}"]
    server = f"http://127.0.0.1:{UI_PORT}" if sqlite_file(uri) else redact(uri).rstrip("/")
    return [
        f"MLflow UI:     {ui_command(uri)}",
        f"scaling view:  {view_address(server, experiment_id, view.key)}",
    ]


def ui_command(uri: str, port: int = UI_PORT) -> str:
    """The one command that opens the UI of a tracking address."""
    if not sqlite_file(uri):
        return f"open {redact(uri)}"
    makefile = Path("Makefile")
    if uri == DEFAULT_URI and port == UI_PORT and makefile.exists() and "\nui:" in makefile.read_text():
        return "make ui"
    return " ".join(server_command(uri, port))


def server_command(uri: str, port: int) -> list[str]:
    mlflow = Path(os.path.relpath(sys.prefix)) / "bin" / "mlflow"
    listen = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [str(mlflow), "server", "--backend-store-uri", uri, *listen]


def _send(folder: StudyFolder, uri: str, tags: dict[str, str]) -> str:
    from trainer.tracking.mlflow_sync import connect, sync_folder, write_views

    tracker = connect(uri, folder.study.tracking.experiment or folder.study.name, attempts=2)
    sync_folder(folder.path, tracker, {})
    return write_views(tracker, tags)


def _description(folder: StudyFolder) -> list[tuple[str, str]]:
    """Makes the UI open the experiment as one of training runs, with a word on what it holds."""
    text = (
        f"Compute-scaling study **{folder.study.name}**: one run a trial (tag `size`), and a run `law` with the fits. "
        "The saved view *Scaling curves* draws the evaluations against training compute, the law over them."
    )
    return [("mlflow.experimentKind", "custom_model_development"), ("mlflow.note.content", text)]
