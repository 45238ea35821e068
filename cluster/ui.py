"""Open the MLflow UI on this machine: `python -m cluster.ui [--port 5000]` (`make ui`). Ends with Ctrl-C."""

from __future__ import annotations

import argparse
import os
import socket

from cluster.tracking import UI_PORT, server_command
from data_pipeline.errors import UserError, run_cli
from evaluation.report.mlflow_views import view_address
from trainer.tracking.uri import default_uri, redact, sqlite_file


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.ui", description=__doc__)
    parser.add_argument("--port", type=int, default=UI_PORT, help=f"on 127.0.0.1 (default {UI_PORT})")
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, else sqlite in runs/mlflow.db")
    args = parser.parse_args()
    uri = args.tracking_uri or default_uri()
    database = sqlite_file(uri)
    if database is None:
        print(f"the tracking server has a UI of its own: {redact(uri)}")
        return 0
    if not database.exists():
        raise UserError(f"there is nothing to show yet: {database} does not exist. Run a study first (`make study`).")
    _check_free(args.port)
    server = f"http://127.0.0.1:{args.port}"
    print(f"MLflow UI: {server} (Ctrl-C ends it)")
    for experiment, name, address in _views(uri, server):
        print(f"  {experiment}, {name}: {address}", flush=True)
    command = server_command(uri, args.port)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.execv(command[0], command)


def _views(uri: str, server: str) -> list[tuple[str, str, str]]:
    from trainer.tracking.mlflow_sync import saved_views

    return [(e, name, view_address(server, experiment_id, key)) for e, experiment_id, key, name in saved_views(uri)]


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} on 127.0.0.1 is in use; choose another: make ui UI_PORT={port + 1} "
                f"(or python -m cluster.ui --port {port + 1})."
            ) from None


if __name__ == "__main__":
    run_cli(main)
