"""A free TCP port for processes that are about to meet. No torch here: launchers need it too."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
