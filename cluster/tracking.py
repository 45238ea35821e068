"""A study in MLflow: its views, its report, and the addresses to look at."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.definition.spec import StudyConfig
from cluster.files.folder import StudyFolder
from data_pipeline.errors import UserError
from data_pipeline.files import write_json
from evaluation.report.mlflow_views import REPORT, address_of_tag, artifact_address, experiment_tags
from trainer.tracking.points import EXPERIMENT_FILE
from trainer.tracking.uri import DEFAULT_URI, default_uri, redact, sqlite_file

if TYPE_CHECKING:  # mlflow and the fits take seconds to import
    from cluster.report import Report
    from trainer.tracking.mlflow_pages import ExperimentPages

UI_PORT = 5000


def write_page(folder: StudyFolder, metrics: Sequence[str] = ()) -> None:
    """Write what the experiment's page shows (views, description) for the importer to send.

    `metrics`: those that laws are sought for; default: those that the study file asks for.
    """
    tags = experiment_tags(folder.study.name, metrics or wanted_metrics(folder.study))
    write_json(folder.path / EXPERIMENT_FILE, tags)


def wanted_metrics(study: StudyConfig) -> list[str]:
    """The metrics, as MLflow names them, whose laws the study will seek."""
    from evaluation.quality import record_name

    nll, distance = study.evaluation.nll, study.evaluation.distance
    names = [f"nll/{split}" for split in nll.splits] if nll is not None else []
    if distance is not None and "fd" in distance.metrics:
        names.append(f"{record_name('fd', distance.feature_net)}/{distance.split}")
    return names


def send_report(folder: StudyFolder, report: Report) -> list[str]:
    """Send what MLflow lacks of the study. Returns the lines that say how to open it, or why it was not sent."""
    tracking = folder.study.tracking
    write_page(folder, report.curves)
    if not tracking.mlflow:
        return ["MLflow:        switched off in the study file (tracking.mlflow)"]
    uri = tracking.uri or default_uri()
    try:
        pages = _send(folder, uri)
    except Exception as error:  # whatever the tracker says: the files are written, and they are the truth
        text = str(error) if isinstance(error, UserError) else f"{redact(uri)}: {redact(str(error), uri)[:300]}"
        return [f"warning: not sent to MLflow: {text}", f"report:        {os.path.relpath(folder.law / 'report.txt')}"]
    lines = page_lines(pages, server_address(uri))
    return [f"MLflow UI:     {ui_command(uri)}, then", *(f"  {line}" for line in lines)]


def page_lines(pages: ExperimentPages, server: str) -> list[str]:
    """A line with its address for each saved view of an experiment, and for its report."""
    found = [address_of_tag(key, value, server, pages.experiment_id) for key, value in pages.views.items()]
    if pages.report_run and REPORT in pages.report_files:
        found.append(("Report", artifact_address(server, pages.experiment_id, pages.report_run, REPORT)))
    width = max((len(name) for name, _ in found), default=0)
    return [f"{name:{width}}  {address}" for name, address in found]


def server_address(uri: str, port: int = UI_PORT) -> str:
    """Where the pages of a tracking address are: on a server of our own for a database, else at the address."""
    return f"http://127.0.0.1:{port}" if sqlite_file(uri) else redact(uri).replace("***@", "").rstrip("/")


def ui_command(uri: str, port: int = UI_PORT) -> str:
    """The one command that opens the UI of a tracking address."""
    if not sqlite_file(uri):
        return f"open {server_address(uri)}"
    makefile = Path("Makefile")
    if uri == DEFAULT_URI and port == UI_PORT and makefile.exists() and "\nui:" in makefile.read_text():
        return "make ui"
    return f"python -m cluster.ui --tracking-uri {uri}" + ("" if port == UI_PORT else f" --port {port}")


def server_command(uri: str, port: int) -> list[str]:
    """The command that serves the UI of a database on loopback."""
    mlflow = Path(os.path.relpath(sys.prefix)) / "bin" / "mlflow"
    listen = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [str(mlflow), "server", "--backend-store-uri", uri, *listen]


def _send(folder: StudyFolder, uri: str) -> ExperimentPages:
    from trainer.tracking.mlflow_pages import experiment_pages
    from trainer.tracking.mlflow_store import connect
    from trainer.tracking.mlflow_sync import sync_folder

    experiment = folder.study.tracking.experiment or folder.study.name
    sync_folder(folder.path, connect(uri, experiment, attempts=2), {})
    (pages,) = experiment_pages(uri, experiment)
    return pages
