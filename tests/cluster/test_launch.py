"""The seam to Ray, on a real Ray of several nodes on this machine: a trial over two of them, versions, what listens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch.parity import environment, skew
from cluster.launch.ranks import ROOT

STUDY = """
name: wide
run: tiny.yaml
ladder: {{key: model.channels, values: [4]}}
settings: {{model.num_heads: 2}}
budget: {{images: 64}}
evaluation: {{test: {data}/test, images: [32], nll: {{splits: [test], num_calls: 128}}}}
resources: {{num_processes: 2, num_nodes: 2, cpus: 2}}
"""


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """The address of a Ray with a head that runs nothing and two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": 80_000_000})
    for host in (3, 4):
        cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{host}", object_store_memory=80_000_000)
    yield cluster.address
    cluster.shutdown()


DRIVE = """
import sys
from pathlib import Path
from cluster.scheduling.driver import Watcher, run_jobs
from cluster.files.folder import StudyFolder
from cluster.launch.ray_backend import RayBackend
from cluster.scheduling.scheduler import Scheduler
from cluster.definition.spec import load_study
from cluster.definition.trials import make_trials

study_file, out, address = sys.argv[1:]
study = load_study(Path(study_file))
folder = StudyFolder(Path(out), study, make_trials(study))
jobs = folder.prepare()

class Show(Watcher):
    def started(self, placement):
        print("started", placement.job.key, len(placement.nodes), flush=True)
    def ended(self, outcome, verdict):
        print("ended", outcome.job.key, outcome.status, outcome.message, outcome.startup, flush=True)

backend = RayBackend(address, allow_skew=True)
print("nodes", sorted(map(backend.name, backend.nodes())), flush=True)
summary = run_jobs(jobs, folder, backend, Scheduler(jobs), [Show()])
print("failures", len(summary.failures), flush=True)
backend.close()
"""


@pytest.mark.timeout(300)
def test_a_trial_trains_on_two_nodes_together(
    tmp_path: Path, tiny_config: Path, generated_data: Path, two_nodes: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_config.read_text())
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(data=generated_data))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", DRIVE, str(study), str(out), two_nodes],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    run = out / "trials" / "channels4-seed0"
    assert "failures 0" in done.stdout, done.stdout + done.stderr
    assert "nodes ['127.0.0.3', '127.0.0.4']" in done.stdout
    assert "started channels4-seed0 2" in done.stdout
    assert json.loads((run / "result.json").read_text())["nimg"] == 64
    assert "1 process(es) on each of 2 nodes" in (run / "log.node1.txt").read_text()
    newest = max((run / "checkpoints").iterdir())
    layout = json.loads((newest / "state.json").read_text())["layout"]
    assert layout["num_processes"] == 2
    assert len(list((run / "evals").glob("*/*.json"))) == 2
    startup = next(line for line in done.stdout.splitlines() if line.startswith("ended channels4-seed0 done"))
    assert 0 < float(startup.split()[-1]) < 120


def test_a_local_ray_listens_on_loopback_only(tmp_path: Path) -> None:
    script = """
import psutil
from cluster.launch.ray_backend import RayBackend
backend = RayBackend()
for process in psutil.Process().children(recursive=True):
    for connection in process.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN:
            print("listens", process.name(), connection.laddr.ip, flush=True)
backend.close()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    listening = {line.split()[-1] for line in done.stdout.splitlines() if line.startswith("listens")}
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_other_versions_are_named() -> None:
    mine = environment()
    assert skew(mine, dict(mine), "host a") is None
    other = {**mine, "torch": "1.0.0", "this project's code": "abc"}
    message = skew(mine, other, "host a")
    assert message is not None
    assert "host a" in message
    assert f"torch 1.0.0 (the driver has {mine['torch']})" in message
    assert "this project's code abc" in message
    assert "deepspeed" not in message
    assert "cluster.allow_skew=true" in message
