"""Ray on hosts that are more than processes: network namespaces with names, addresses and cables on a switch.

Each host's processes are in a process namespace of their own, as on a machine. Linux, root, `ip` and `unshare`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fault_cluster import HEAD, OBJECT_STORE_BYTES
from benchmarks.fault_marks import environment, kill_all
from data_pipeline.errors import UserError

_PORT = 6379
_START_SECONDS = 90.0
# A namespace of processes, with a /proc and a host name of its own; what begins it ends with whoever started it.
_ALONE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class HostCluster:
    """A head and nodes, each a host at 10.78.0.x."""

    def __init__(self, token: str, *, num_nodes: int, cpus: int) -> None:
        """Raises UserError where no namespaces can be made."""
        if not (shutil.which("ip") and shutil.which("unshare")):
            raise UserError("--hosts needs `ip` (iproute2) and `unshare` (util-linux); install them, or leave it out.")
        self.token, self._cpus = token, cpus
        self.names = [f"node{number}" for number in range(num_nodes)]
        self._hosts = [HEAD, *self.names]
        self._folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for the driver, too
        self._processes: list[subprocess.Popen[bytes]] = []
        self.address = f"{self._address(HEAD)}:{_PORT}"
        try:
            self._build()
            self._begin()
        except subprocess.CalledProcessError as error:
            self.close()
            raise UserError(f"no network namespaces here (root is needed): {error.stderr.strip()}") from None
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        switch = self._space("switch")
        for name in ("switch", *self._hosts):
            _ip("netns", "add", self._space(name))
            _ip("-n", self._space(name), "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for name in self._hosts:
            space = self._space(name)
            _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{self._address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _begin(self) -> None:
        for name in self._hosts:
            self.add(name)

    def _space(self, name: str) -> str:
        return f"{self.token}{name}"

    def _address(self, name: str) -> str:
        return f"10.78.0.{1 + self._hosts.index(name)}"

    def _on(self, name: str, command: Sequence[str], *, alone: bool) -> list[str]:
        apart = _ALONE if alone else ["unshare", "--uts"]
        named = ["sh", "-c", f'hostname {name}; exec "$@"', "sh", *command]
        return ["ip", "netns", "exec", self._space(name), *apart, *named]

    def add(self, name: str) -> None:
        where = ["--head", "--port", str(_PORT), "--include-dashboard", "false", "--num-cpus", "0"]
        if name != HEAD:
            where = ["--address", self.address, "--num-cpus", str(self._cpus)]
        store = ["--object-store-memory", str(OBJECT_STORE_BYTES), "--temp-dir", str(self._folder / name)]
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command = [*ray, *where, *store, "--node-ip-address", self._address(name)]
        extra = {"GLOO_SOCKET_IFNAME": "eth0", "RAY_USAGE_STATS_ENABLED": "0"}
        log = self._folder / f"{name}.log"
        with open(log, "ab") as file:
            process = subprocess.Popen(
                self._on(name, command, alone=True), env=environment(f"{self.token}/{name}", extra),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        deadline = time.monotonic() + _START_SECONDS
        while "--block" not in (text := log.read_text(errors="replace")) and "Ray runtime started" not in text:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not start: {text[-2000:]}")
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        kill_all(f"{self.token}/{name}")
        (self._folder / f"{name}.log").unlink(missing_ok=True)

    def cut(self, name: str, *, off: bool) -> None:
        _ip("-n", self._space("switch"), "link", "set", name, "down" if off else "up")

    def renew(self) -> None:
        for name in self._hosts:
            self.kill(name)
        self._begin()

    def inside(self, command: Sequence[str]) -> list[str]:
        return self._on(HEAD, command, alone=False)

    def close(self) -> None:
        for name in self._hosts:
            kill_all(f"{self.token}/{name}")
        for process in self._processes:
            process.wait()
        for name in ("switch", *self._hosts):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self._space(name))
        shutil.rmtree(self._folder, ignore_errors=True)
