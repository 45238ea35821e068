"""Training over several hosts: network namespaces with their own names, addresses and cables, on a switch.

Whichever launcher starts it, two hosts give the figures of two processes on one; and when a cable is pulled, both
sides end, say why, and the same command continues.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import ROOT, run_ranks

from trainer.exits import Exit
from trainer.tracking.records import read_train_records

BIN = Path(sys.executable).parent


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Network:
    """Hosts 0, 1, ... at 10.77.0.1, 10.77.0.2, ..., their cables in one switch."""

    names: list[str]
    switch: str
    processes: list[subprocess.Popen[str]]

    @classmethod
    def build(cls, size: int) -> Network:
        tag = f"ds{os.getpid()}"
        network = cls([f"{tag}h{number}" for number in range(size)], f"{tag}sw", [])
        try:
            for name in (*network.names, network.switch):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", network.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", network.switch, "link", "set", "bridge", "up")
            for number, name in enumerate(network.names):
                cable = f"cable{number}"
                ip("-n", network.switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", network.switch, "link", "set", cable, "master", "bridge", "up")
                ip("-n", name, "addr", "add", f"{network.address(number)}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            network.remove()
            pytest.skip(f"no network namespaces here (root and CAP_NET_ADMIN needed): {error.stderr.strip()}")
        return network

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Run a command on a host, under that host's name."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname host{host}; exec "$@"', "sh", *command]
        variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
            "GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *inside], env=variables | environment, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def plug(self, host: int, state: str) -> None:
        ip("-n", self.switch, "link", "set", f"cable{host}", state)

    def inhabitants(self) -> set[int]:
        """Every process that lives on one of the hosts, whoever started it."""
        words = [subprocess.run(["ip", "netns", "pids", n], capture_output=True, text=True).stdout for n in self.names]
        return {int(word) for text in words for word in text.split()}

    def remove(self) -> None:
        for pid in self.inhabitants():
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
        for process in self.processes:
            process.wait()
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("`ip` (iproute2) and `unshare` (util-linux) are not installed")
    built = Network.build(2)
    yield built
    built.remove()


def launcher(kind: str, network: Network, host: int, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The command that starts a host's share of the job, and its environment."""
    port, master = "29500", network.address(0)
    if kind == "torchrun":
        where = ["--nnodes=2", f"--node-rank={host}", f"--master-addr={master}", f"--master-port={port}"]
        return [str(BIN / "torchrun"), "--nproc-per-node=1", *where], {}
    if kind == "deepspeed":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("host0 slots=1\nhost1 slots=1\n")
        where = ["--node_rank", str(host), "--master_addr", master, "--master_port", port]
        return [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", *where], {}
    ranks = {"RANK": str(host), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    return [sys.executable], ranks | {"MASTER_ADDR": master, "MASTER_PORT": port}


def start(
    kind: str, network: Network, tmp_path: Path, *arguments: str, script: str = "trainer/run.py"
) -> list[subprocess.Popen[str]]:
    processes = []
    for host in range(2):
        command, environment = launcher(kind, network, host, tmp_path)
        processes.append(network.start(host, *command, script, *arguments, **environment))
    return processes


def outputs(processes: list[subprocess.Popen[str]], timeout: float = 200) -> list[str]:
    return [process.communicate(timeout=timeout)[0] for process in processes]


def figures(folder: Path) -> list[dict[str, float]]:
    """Of every record, all that is no measurement of time or memory."""
    timed = ("speed/", "memory/", "system/", "time/")
    records = read_train_records(folder)
    return [{k: v for k, v in record.values.items() if not k.startswith(timed)} for record in records]


def ends_with_a_cause_when_cut_off(kind: str, network: Network, tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--config", str(tiny_config), f"run.folder={folder}", "train.log_every_images=8",
                 "train.checkpoint_every_images=16", "train.export_images=[]"]  # fmt: skip
    processes = start(
        kind, network, tmp_path, *arguments, "train.budget_images=1000000", script="tests/trainer/impatient_run.py"
    )
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("0*")) if folder.exists() else True:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), outputs(processes)
        time.sleep(0.1)
    network.plug(1, "down")
    texts = outputs(processes, timeout=90)
    assert "process 1 (pid " in texts[0]
    assert "on host1) has not answered" in texts[0]
    assert "lost the main process, process 0" in texts[1]
    assert "on host0): it has not answered" in texts[1]
    assert all(process.returncode != 0 for process in processes)
    if kind == "environment":
        assert [process.returncode for process in processes] == [Exit.LOST, Exit.LOST]
    assert not network.inhabitants()  # no orphans, launchers' children included
    network.plug(1, "up")
    reached = max(int(path.name) for path in (folder / "checkpoints").glob("0*"))
    processes = start(kind, network, tmp_path, *arguments, f"train.budget_images={reached + 16}")
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    assert f"resuming at {reached:,} images" in texts[0]


def test_a_host_that_is_cut_off_ends_the_job_and_it_resumes(
    network: Network, tiny_config: Path, tmp_path: Path
) -> None:
    ends_with_a_cause_when_cut_off("environment", network, tiny_config, tmp_path)


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_a_host_that_is_cut_off_ends_its_launchers_too(
    kind: str, network: Network, tiny_config: Path, tmp_path: Path
) -> None:
    ends_with_a_cause_when_cut_off(kind, network, tiny_config, tmp_path)


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["torchrun", "deepspeed", "environment"])
def test_two_hosts_give_the_figures_of_one(kind: str, network: Network, tiny_config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(tiny_config), "train.log_every_images=8"]
    run_ranks(["trainer/run.py", *arguments, f"run.folder={tmp_path / 'one'}"], 2)
    processes = start(kind, network, tmp_path, *arguments, f"run.folder={tmp_path / 'two'}")
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    assert len(figures(tmp_path / "one")) == 6
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    assert not network.inhabitants()
