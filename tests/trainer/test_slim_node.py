"""A training node needs neither MLflow nor Ray: it trains, says once what is missing, and its records go later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ranks import ROOT

from trainer.tracking.records import read_train_records


@pytest.fixture
def slim(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing either fails, as where they are not installed."""
    for name in ("mlflow", "ray"):
        (tmp_path / "slim" / name).mkdir(parents=True)
        text = f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n'
        (tmp_path / "slim" / name / "__init__.py").write_text(text)
    return os.environ | {"PYTHONPATH": str(tmp_path / "slim")}


def test_a_run_without_mlflow_and_ray_is_imported_later(
    tiny_config: Path, tmp_path: Path, slim: dict[str, str]
) -> None:
    folder, uri = tmp_path / "my run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}"]
    settings = ["tracking.mlflow=true", f"tracking.uri={uri}"]
    for name in ("mlflow", "ray"):  # the stubs are really found first
        assert subprocess.run(
            [sys.executable, "-c", f"import {name}"], env=slim, cwd=ROOT, capture_output=True
        ).returncode
    done = subprocess.run([*command, *settings], env=slim, cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: nothing is sent to MLflow (No module named 'mlflow')") == 1
    assert "Traceback" not in done.stderr
    later = f"python -m trainer.tracking.mlflow_sync '{folder}' --experiment runs"
    assert later in done.stderr
    assert [record.nimg for record in read_train_records(folder)][-1] == 48
    assert not (tmp_path / "mlflow.db").exists()

    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    sent = subprocess.run(later, shell=True, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert sent.returncode == 0, sent.stderr
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("runs").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.value for metric in history] == [r.values["train/loss"] for r in read_train_records(folder)]
