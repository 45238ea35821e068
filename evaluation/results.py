"""Where an evaluation's results are kept: its records, its pictures and arrays, and the chunks of one under way.

RUN/evals/<nimg>/<key>.json, RUN/evals/<nimg>/<key>/ and RUN/evals/<nimg>/.<key>.chunks/; for an export that belongs to
no run (an imported one, or one that was copied away) all this lies in EXPORT/evals/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import write_atomic, write_json
from evaluation.report.tables import metrics_table
from evaluation.request import EvalRequest
from evaluation.subject import weights_identity
from trainer.export import Export
from trainer.tracking.records import EvalRecord, read_eval_records


def run_of(export: Export) -> Path | None:
    """The folder of the run that an export lies in; None for one that was copied away, or imported."""
    run = export.path.resolve().parent.parent
    return run if (run / "run.json").exists() else None


def key_of(export: Export, request: EvalRequest) -> str:
    """Names an evaluation of an export. Raises UserError when the export holds no such weights."""
    return request.key(weights_identity(export, request.weights, request.ensemble))


def result_path(export: Export, request: EvalRequest) -> Path:
    """The file of the records of this evaluation. Raises UserError when the export holds no such weights."""
    folder, run = export.path.resolve(), run_of(export)
    return (run / "evals" / folder.name if run else folder / "evals") / f"{key_of(export, request)}.json"


def artifacts_of(result: Path) -> Path:
    """The folder of an evaluation's pictures and arrays."""
    return result.with_suffix("")


def chunks_of(result: Path, key: str) -> Path:
    """The folder of the chunks of an evaluation under way."""
    return result.with_name(f".{key}.chunks")


def holds(result: Path, key: str) -> bool:
    """Whether the file is there. Raises UserError when it is another evaluation's, or no file of records at all."""
    if not result.exists():
        return False
    try:
        found = json.loads(result.read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != key:
        raise UserError(f"{result} is not the result of this evaluation; delete it, or name another --out.")
    return True


def check_out(result: Path, key: str) -> None:
    """Raises UserError for a file of the user's choice beside which something of theirs would be overwritten."""
    if result.suffix != ".json":
        raise UserError(f"--out {result} must end in .json.")
    folder = artifacts_of(result)
    if folder.exists() and not result.exists() and not chunks_of(result, key).exists():
        raise UserError(f"--out {result}: pictures and arrays go to {folder}, which exists; give another name.")


def write_records(path: Path, key: str, records: Sequence[EvalRecord], request: EvalRequest) -> None:
    """Write an evaluation's records and its request, atomically: the proof that it is done.

    `name` is what its artifacts' folder is called where people look at them.
    """
    name = f"{'-'.join(request.metrics)}-{records[0].split}-{key[:6]}"  # no spaces: it stands in links
    spec: dict[str, Any] = asdict(request) | {"sampling": request.sampling.model_dump(mode="json")}
    write_json(
        path,
        {
            "key": key,
            "name": name,
            "records": [r.to_json() for r in records],
            "spec": json.loads(json.dumps(spec, default=str)),
        },
    )


def write_table(run: Path) -> None:
    """Write the table of all that was measured of a run to RUN/evals/metrics.txt."""
    write_atomic(run / "evals" / "metrics.txt", metrics_table(read_eval_records(run)) + "\n")


def send_to_mlflow(export: Export) -> None:
    """Mirror the run's records to where its config says; a tracker that is down costs a warning, no result."""
    tracking, run = export.config.tracking, run_of(export)
    if run is None:
        return
    environment = dict(os.environ) | ({"MLFLOW_TRACKING_URI": tracking.uri} if tracking.uri else {})
    command = [sys.executable, "-m", "trainer.tracking.mlflow_sync", str(run), "--experiment", tracking.experiment]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"warning: not sent to MLflow ({why}); the records are in the run folder.", file=sys.stderr)
