"""Open the MLflow UI on this machine: `python -m cluster.ui [--port 5000]` (`make ui`). Ends with Ctrl-C.

Prints the address of every experiment's saved views and report once the server answers, and opens the first one in the
browser where there is a display.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.tracking import UI_PORT, page_lines, server_address, server_command
from data_pipeline.errors import UserError, run_cli
from trainer.tracking.uri import default_uri, sqlite_file

_START_SECONDS = 120.0
_STOP_SECONDS = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.ui", description=__doc__)
    parser.add_argument("--port", type=int, default=UI_PORT, help=f"on 127.0.0.1 (default {UI_PORT})")
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, else sqlite in runs/mlflow.db")
    parser.add_argument("--no-browser", action="store_true", help="print the addresses only")
    args = parser.parse_args()
    uri = args.tracking_uri or default_uri()
    server = server_address(uri, args.port)
    if sqlite_file(uri) is None:
        print(f"the tracking server has a UI of its own: {server}")
        show(uri, server, browser=not args.no_browser)
        return 0
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _frame: sys.exit(128 + number))  # not without ending the server
    with serving(uri, args.port) as process:
        print(f"MLflow UI: {server} (Ctrl-C ends it)")
        show(uri, server, browser=not args.no_browser)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            return 0
    raise UserError(
        f"the MLflow server ended by itself (exit code {code}); mlflow-server.log beside the database says why."
    )


def show(uri: str, server: str, *, browser: bool) -> None:
    """Print the addresses of all pages, and open the first of them where there is a display."""
    from trainer.tracking.mlflow_pages import experiment_pages
    from trainer.tracking.mlflow_store import require_answer

    with require_answer(uri):
        found = experiment_pages(uri)
    lines = []
    for pages in found:
        mine = page_lines(pages, server)
        print("\n".join([f"{pages.name}:", *(f"  {line}" for line in mine)]), flush=True)
        lines += mine
    if not lines:
        print("no experiment has a saved view yet: a study writes them when it starts (make study)", flush=True)
    if browser and has_display():
        webbrowser.open(lines[0].split()[-1] if lines else server)


@contextmanager
def serving(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server of a sqlite address on loopback, from when it answers until the end of the block.

    Raises UserError: no such database, the port is in use, or the server does not start.
    """
    database = sqlite_file(uri)
    if database is None or not database.exists():
        raise UserError(f"there is nothing to show yet: {database} does not exist. Run a study first (`make study`).")
    _check_free(port)
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true"} | os.environ
    log = database.with_name("mlflow-server.log")  # it says much, and the addresses should stay on the screen
    with open(log, "wb") as output:
        process = subprocess.Popen(
            server_command(uri, port), env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until_it_answers(process, port, log)
        yield process
    finally:
        _end(process)


def has_display() -> bool:
    """Whether a browser window can be opened here."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def wait_until_it_answers(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    """Return once the server on loopback answers. Raises UserError, naming its log, where it ends or stays silent."""
    deadline = time.monotonic() + _START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is not for a proxy
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UserError(
                f"the MLflow server did not start (exit code {process.returncode}); see its messages above."
            )
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise UserError(f"the MLflow server does not answer on port {port} after {_START_SECONDS:.0f} s; see {log}.")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the workers that it started: they are a process group of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_STOP_SECONDS)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


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
