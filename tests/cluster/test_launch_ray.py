"""configs/launch: the Slurm script that starts Ray, with stand-ins for Slurm and for Ray, and with a real Ray; the
autoscaling cluster file, checked by Ray and scaled by Ray's autoscaler.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs" / "launch"

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
wait "${tasks[@]}"; wait "${tasks[@]}"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'localhost\\nnode4\\n'; else echo "scontrol $*"; fi
"""
RAY = """#!/bin/bash
case $1 in
start)
    [[ $* == *--head* ]] && name=head || name=worker
    [[ $name == worker && -n $NO_WORKER ]] && exec sleep 60
    echo "$name token ${#RAY_AUTH_TOKEN} mode $RAY_AUTH_MODE: $*" >>"$STATE/started"
    mkdir -p "$RAY_TEMP"
    trap 'rm "$STATE/$name"; echo $name >>"$STATE/ended"; exit' TERM
    echo $$ >"$STATE/$name"
    while true; do sleep 0.1; done ;;
health-check) [[ -e $STATE/head ]] ;;
status) echo Active:; for node in "$STATE"/{head,worker}; do [[ -e $node ]] && echo " 1 node_x"; done; echo Pending: ;;
esac
"""
PYTHON = """#!/bin/bash
echo "driver: $*"
trap 'echo saving; exit 130' TERM
[[ -n $LOSE ]] && { kill $(cat "$STATE/head"); sleep 0.5; }
touch "$STATE/driving"
[[ $EXIT == wait ]] || exit $EXIT
while true; do sleep 0.1; done
"""

STUDY = """
name: slurm
run: {run}
ladder: {{key: model.channels, values: [4, 8], label: "C={{value}}"}}
settings: {{model.num_heads: 2, train.log_every_images: 128}}
budget: {{images: 3072}}
evaluation: {{test: {test}, images: [512], nll: {{splits: [test], num_calls: 128}}}}
tracking: {{mlflow: false}}
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sbatch(tmp_path: Path) -> Iterator[Start]:
    """Starts the script in a directory of stand-ins; ends it and what it started."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **settings: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "0",
        }  # fmt: skip
        environment = os.environ | slurm | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD_ADDRESS": "127.0.0.2", "LOSSES": str(tmp_path / "losses"),
        } | settings  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(LAUNCH / "ray.sbatch"), *arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    write_programs(tmp_path, srun=SRUN, scontrol=SCONTROL)
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_programs(folder: Path, **programs: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def wait_for(done: Callable[[], object], seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("settings", "told", "losses", "code", "requeued", "losses_after"),
    [
        ({"EXIT": "0"}, None, 7, 0, False, 7),
        ({"EXIT": "2"}, None, 0, 2, False, 0),
        ({"EXIT": "130"}, None, 0, 130, False, 0),  # somebody stopped the study
        ({"EXIT": "wait"}, signal.SIGUSR1, 20, 0, True, 20),
        ({"EXIT": "wait"}, signal.SIGTERM, 0, 130, False, 0),
        ({"EXIT": "137"}, None, 19, 0, True, 20),
        ({"EXIT": "137"}, None, 20, 137, False, 21),
        ({"EXIT": "2", "LOSE": "yes"}, None, 0, 0, True, 1),  # no head, so no mistake of the user's
        ({"EXIT": "0", "NO_WORKER": "yes", "JOIN_SECONDS": "1"}, None, 0, 0, False, 0),
    ],
)
def test_the_slurm_script(
    tmp_path: Path, sbatch: Start, settings: dict[str, str], told: signal.Signals | None,
    losses: int, code: int, requeued: bool, losses_after: int,
) -> None:  # fmt: skip
    write_programs(tmp_path / "bin", ray=RAY, python=PYTHON)
    state = tmp_path / "state"
    state.mkdir()
    if losses:
        (tmp_path / "losses").write_text(f"{losses}\n")
    places = {"BIN": str(tmp_path / "bin"), "STATE": str(state), "RAY_TEMP": str(tmp_path / "temp")}
    process = sbatch("study.yaml", "--out", "a b", **places, **settings)
    if told is not None:
        wait_for((state / "driving").exists, 20, process)
        process.send_signal(told)
    said = process.communicate(timeout=30)[0]

    assert process.returncode == code, said
    assert ("scontrol requeue 77" in said) == requeued
    assert (int((tmp_path / "losses").read_text()) if losses_after else 0) == losses_after
    assert "driver: -m cluster.study run study.yaml --out a b --address 127.0.0.2:20077\n" in said
    assert ("saving" in said) == (told is not None)
    nodes = {"head"} if "NO_WORKER" in settings else {"head", "worker"}
    assert f"Ray at 127.0.0.2:20077: {len(nodes)} of 2 nodes" in said
    assert set((state / "ended").read_text().split()) == nodes  # Ray is ended in all cases, and its files removed
    assert not (tmp_path / "temp").exists()
    lines = (state / "started").read_text().splitlines()
    assert len(lines) == len(nodes)
    for line in lines:
        assert "token 64 mode token: start" in line
        assert "--num-cpus=1 " in line
        assert "--num-gpus=0" in line
    head = next(line for line in lines if line.startswith("head"))
    assert "--head --node-ip-address=127.0.0.2 --port=20077 --dashboard-host=127.0.0.1 --dashboard-port=20078" in head


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_a_study_under_slurm_on_a_real_ray(
    tmp_path: Path, sbatch: Start, generated_data: Path, tiny_config: Path
) -> None:
    """Two nodes (of one machine) started by the script; stopped before the time limit, and started again."""
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(run=tiny_config, test=generated_data / "test"))
    session = tempfile.mkdtemp(prefix="ray-")
    settings = {"BIN": str(Path(sys.executable).parent), "RAY_TEMP": session}
    settings |= {"RAY_PORT": str(free_ports()), "LOSSES": str(tmp_path / "losses"), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    process = sbatch(str(study), "--out", str(out), **settings)
    wait_for(lambda: list(out.glob("trials/*/exports/*/manifest.json")), 150, process)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 0, said
    assert "2 of 2 nodes" in said
    assert "stopped after saving: back into the queue\nscontrol requeue" in said
    assert not Path(session).exists()
    assert not list(out.glob("trials/*/result.json"))

    process = sbatch(str(study), "--out", str(out), **settings)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    assert len(list(out.glob("trials/*/result.json"))) == 2
    assert "scontrol requeue" not in said
    assert not Path(session).exists()
    assert not running_with(session)


def free_ports() -> int:
    """The first of three ports that are free, outside the range that Ray gives its workers."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + 3):
                stack.enter_context(socket.create_server(("", port)))
            return first


def running_with(text: str) -> list[int]:
    """Processes whose command line holds `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


# ---- the autoscaling cluster file -----------------------------------------------------------------------------------

CLUSTER = LAUNCH / "ray-cluster.yaml"
HEAD_ID = "f" * 51 + "0" * 5
SCALE = """
import sys, time
import ray
from ray.autoscaler.sdk import request_resources

def gpu_nodes():
    return sum(node["Alive"] and node["Resources"].get("GPU") == 8 for node in ray.nodes())

def wait_until(done):
    deadline = time.monotonic() + 150
    while not done(gpu_nodes()):
        assert time.monotonic() < deadline, gpu_nodes()
        time.sleep(0.5)

ray.init(address=sys.argv[1], log_to_driver=False)
assert gpu_nodes() == 0
request_resources(bundles=[{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}, {"CPU": 1, "GPU": 1}])
wait_until(lambda count: count >= 3)
print("grown", flush=True)
until = time.monotonic() + 20
while time.monotonic() < until:  # idle for longer than the timeout, but asked for
    assert gpu_nodes() >= 3
    time.sleep(0.5)
print("held", gpu_nodes(), flush=True)
request_resources(bundles=[])
wait_until(lambda count: count == 0)
print("shrunk")
"""


@pytest.fixture
def cluster_config() -> dict[str, Any]:
    """The file as Ray reads it, checked against its schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(config)
    return config


def test_ray_accepts_the_cluster_file(cluster_config: dict[str, Any]) -> None:
    head, gpu = (cluster_config["available_node_types"][name] for name in ("head", "gpu"))
    assert cluster_config["head_node_type"] == "head"
    assert "InstanceMarketOptions" not in head["node_config"]  # on demand
    assert head["resources"] == {"CPU": 0}
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0
    assert gpu["max_workers"] == cluster_config["max_workers"]
    for kind in ("head", "worker"):  # none of Ray's defaults, which install another Ray and open the dashboard to all
        start = cluster_config[f"{kind}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert ".venv/bin" in start
    assert "--dashboard-host=127.0.0.1" in cluster_config["head_start_ray_commands"][-1]
    commands = [command for key, value in cluster_config.items() if key.endswith("commands") for command in value]
    assert not [command for command in commands if "0.0.0.0" in command or "pip install" in command]
    assert all(subprocess.run(["bash", "-n", "-c", command]).returncode == 0 for command in commands)


@pytest.mark.prove
def test_the_cluster_file_starts_spot_nodes(
    cluster_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own code for AWS, against a stand-in of AWS."""
    (tmp_path / ".ssh").mkdir()
    for name, value in {"HOME": tmp_path, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, str(value))
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2 = boto3.resource("ec2", "us-east-1")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = vpc.create_subnet(CidrBlock="10.0.0.0/24", AvailabilityZone="us-east-1a")
        ec2.meta.client.modify_subnet_attribute(SubnetId=subnet.id, MapPublicIpOnLaunch={"Value": True})
        group = vpc.create_security_group(GroupName="own", Description="own")
        for kind in cluster_config["available_node_types"].values():
            image = next(iter(ec2.images.all())).id
            kind["node_config"] |= {"SubnetId": subnet.id, "SecurityGroupIds": [group.id], "ImageId": image}
        config = AWSNodeProvider.bootstrap_config(cluster_config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        gpu = config["available_node_types"]["gpu"]
        tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu", "ray-node-name": "n", "ray-launch-config": "h"}
        provider.create_node_with_resources_and_labels(gpu["node_config"], tags, 1, gpu["resources"], {})
        (node,) = ec2.instances.all()
        assert (node.instance_type, node.instance_lifecycle) == ("p4d.24xlarge", "spot")
        assert [found["GroupId"] for found in node.security_groups] == [group.id]
        unsaid = {"available_node_types": {"gpu": {"node_config": gpu["node_config"], "resources": {}}}}
        known = provider.fillout_available_node_types_resources(config | unsaid)["available_node_types"]["gpu"][
            "resources"
        ]
        assert {name: known[name] for name in ("CPU", "GPU")} == gpu["resources"]  # as AWS describes this machine


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_the_cluster_grows_and_shrinks_with_the_demand(tmp_path: Path, cluster_config: dict[str, Any]) -> None:
    """Ray's autoscaler with the file's node types; its stand-in of a cloud starts their raylets on this machine."""
    port = free_ports()
    types = cluster_config["available_node_types"]
    for kind in types.values():
        kind["node_config"] = {}
    types["gpu"]["resources"]["object_store_memory"] = 80_000_000
    provider = {
        "type": "fake_multinode", "head_node_id": HEAD_ID, "launch_multiple": True, "disable_node_updaters": True,
        "use_node_id_as_ip": True,  # several nodes on one machine
        "gcs_address": f"127.0.0.2:{port}",
    }  # fmt: skip
    cluster_config |= {
        "provider": provider, "available_node_types": {"ray.head.default": types["head"], "gpu": types["gpu"]},
        "head_node_type": "ray.head.default", "idle_timeout_minutes": 0.1, "file_mounts": {},
    }  # fmt: skip
    cluster_config |= {key: [] for key in cluster_config if key.endswith("commands")}
    (tmp_path / "cluster.json").write_text(json.dumps(cluster_config))
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    session = tempfile.mkdtemp(prefix="ray-")
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.2"]
    command += [f"--port={port}", f"--dashboard-port={port + 1}", f"--ray-client-server-port={port + 2}"]
    command += ["--num-cpus=0", f"--temp-dir={session}", "--object-store-memory=80000000"]
    command += ["--dashboard-agent-listen-port=0", f"--autoscaling-config={tmp_path}/cluster.json"]
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in (tmp_path / "head.log").read_bytes():
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        scale = [sys.executable, "-c", SCALE, f"127.0.0.2:{port}"]
        done = subprocess.run(scale, env=environment, capture_output=True, text=True, timeout=500)
        assert done.stdout.split() == ["grown", "held", "3", "shrunk"], done.stderr
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(session, ignore_errors=True)
    assert not running_with(session)
