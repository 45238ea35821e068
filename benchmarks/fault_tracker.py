"""An MLflow server that can be killed and started again, and what its database holds in the end."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fault_cluster import Nodes, start
from benchmarks.fault_marks import kill_all

_START_SECONDS = 120.0
# Asked on the head, whose loopback is not always this process's; loopback is not for a proxy.
_PROBE = """
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=2)
"""

# (run's name, metric, step) -> value, for what was evaluated
Evaluated = dict[tuple[str, str, int], float]


class MlflowServer:
    """`mlflow server` over a sqlite file, where the driver runs."""

    def __init__(self, cluster: Nodes, folder: Path, port: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database, self.uri = folder / "mlflow.db", f"http://127.0.0.1:{port}"
        self._cluster, self._folder, self._port = cluster, folder, port

    def start(self) -> None:
        """Returns when it answers. Raises RuntimeError where it does not."""
        listen = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self._folder)]
        extra = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [str(Path(sys.executable).with_name("mlflow")), "server", *store, *listen]
        start(self._cluster, command, log=self._folder / "server.log", extra=extra, where="mlflow")
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow server does not answer; see {self._folder / 'server.log'}")
            time.sleep(1.0)

    def answers(self) -> bool:
        probe = [sys.executable, "-S", "-c", _PROBE, f"{self.uri}/health"]
        return subprocess.run(self._cluster.inside(probe), capture_output=True, check=False).returncode == 0

    def kill(self) -> int:
        """kill -9 of the server and its workers. Returns how many there were."""
        return kill_all(f"{self._cluster.token}/mlflow")

    def evaluated(self) -> tuple[Evaluated, list[str]]:
        """The evaluated points that it holds, and those that it holds twice."""
        return evaluated_in(self.database)


def evaluated_in(database: Path) -> tuple[Evaluated, list[str]]:
    """The evaluated points in a tracking database, and the points of whatever kind that stand there twice."""
    runs = "metrics m join runs r using (run_uuid) where r.lifecycle_stage = 'active'"
    evaluated = "(m.key like 'nll/%' or m.key like 'fd_%') and m.key not like '%GFLOP' and r.name not like 'law %'"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(f"select r.name, m.key, m.step, m.value from {runs} and {evaluated}").fetchall()
        repeated = connection.execute(
            f"select r.name, m.key, m.step from {runs} and m.key not like '%GFLOP' "
            "group by run_uuid, m.key, m.step having count(*) > 1"
        ).fetchall()
    points: Evaluated = {(name, key, step): value for name, key, step, value in rows}
    return points, [f"{name} {key} at step {step}" for name, key, step in repeated]
