"""A real Ray of several nodes on one machine: a head without devices, and nodes that can die and come back.

Each node has a loopback address of its own and all that runs on it is known by a mark, so that a node's death is that
of its raylet, its workers and whatever these started, at once. (`fault_hosts.py` makes hosts that are more than that.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.fault_marks import environment, kill_all, passing_on

OBJECT_STORE_BYTES = 80_000_000
HEAD = "head"


class Nodes(Protocol):
    """What a rehearsal needs of a cluster."""

    @property
    def names(self) -> Sequence[str]:
        """Of the nodes with devices."""

    @property
    def address(self) -> str:
        """Of the head's server."""

    @property
    def token(self) -> str:
        """What the marks of all its processes begin with."""

    def add(self, name: str) -> None:
        """Start a node, or start it again. Returns when it has begun."""

    def kill(self, name: str) -> None:
        """The death of a node: all that runs on it, at once."""

    def cut(self, name: str, *, off: bool) -> None:
        """Pull a node's cable, or plug it in."""

    def renew(self) -> None:
        """End what is left of the cluster and start another, perhaps at another address."""

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs this one on the head, where the driver is."""

    def close(self) -> None: ...


def start(
    cluster: Nodes, command: Sequence[str], *, where: str, log: Path, extra: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Run a command on the head, marked TOKEN/`where`."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            cluster.inside(command), env=environment(f"{cluster.token}/{where}", extra), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


class LocalCluster:
    """`ray.cluster_utils.Cluster`: all nodes are processes of this machine."""

    def __init__(self, token: str, *, num_nodes: int, cpus: int) -> None:
        """Starts the head and the nodes; `cpus` of each node, whatever the machine has."""
        self.names = [f"node{number}" for number in range(num_nodes)]
        self.token, self._cpus = token, cpus
        self._begin()

    def _begin(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))  # short: sockets' paths are limited
        os.environ |= {"RAY_TMPDIR": str(self._folder), "RAY_USAGE_STATS_ENABLED": "0"}
        from ray.cluster_utils import Cluster

        # Not 127.0.0.1, which Ray takes for the name of an address that is seen from outside.
        head = self._settings(2) | {"num_cpus": 0, "include_dashboard": False}
        with passing_on(f"{self.token}/{HEAD}"):
            self._cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self._nodes: dict[str, Any] = {}
        self.address = str(self._cluster.address)
        for name in self.names:
            self.add(name)

    def _settings(self, last_byte: int) -> dict[str, Any]:
        return {"object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": f"127.0.0.{last_byte}"}

    def add(self, name: str) -> None:
        settings = self._settings(3 + self.names.index(name))
        with passing_on(f"{self.token}/{name}"):
            self._nodes[name] = self._cluster.add_node(num_cpus=self._cpus, **settings)

    def kill(self, name: str) -> None:
        kill_all(f"{self.token}/{name}")
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def cut(self, name: str, *, off: bool) -> None:
        raise NotImplementedError("nodes on one machine have no cables")

    def renew(self) -> None:
        for name in (HEAD, *self.names):
            kill_all(f"{self.token}/{name}")
        self.close()
        self._begin()

    def inside(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def close(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
