"""What there is to look at in a store: the saved views of its experiments, and their reports."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow import MlflowClient

from trainer.tracking.mlflow_store import search_experiments, search_runs

_VIEW_TAG = "mlflow.sharedViewState."


@dataclass(frozen=True)
class ExperimentPages:
    """The pages of one experiment."""

    name: str
    experiment_id: str
    views: dict[str, str]  # key -> each saved view, as the tag's value
    report_run: str | None  # MLflow's id of the run that carries the report
    report_files: tuple[str, ...]  # that run's artifacts


def experiment_pages(uri: str, experiment: str | None = None) -> list[ExperimentPages]:
    """The pages of one experiment, or of every one that has any."""
    client = MlflowClient(tracking_uri=uri)
    found = []
    for entry in search_experiments(client):
        if experiment in (None, entry.name):
            views = {k.removeprefix(_VIEW_TAG): v for k, v in entry.tags.items() if k.startswith(_VIEW_TAG)}
            reports = search_runs(client, entry.experiment_id, "tags.kind = 'report'")
            run = next((report.info.run_id for report in reports), None)
            files = tuple(file.path for file in client.list_artifacts(run)) if run else ()
            if views or run:
                found.append(ExperimentPages(entry.name, str(entry.experiment_id), views, run, files))
    return found
