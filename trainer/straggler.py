"""Names a process that is slower than the others, once it has been so for a while.

It reads the meter's `speed/slowest_process` and `speed/slowest_ratio`, which compare the processes' own forward
passes: the one part of a step in which nobody waits for anybody. ZeRO-3 is the exception: there the forward pass
gathers weights, and whoever is fast waits in it for whoever is slow. Where the gathers are prefetched, as they are for
small networks, the ratio is only smaller than it should be; where every layer waits for its own, it is 1 and nobody is
named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_RATIO = 1.3  # the slowest process's time over the others' median; less is everyday noise
PATIENCE = 3  # intervals in a row


class StragglerWatch:
    """Sees every interval's record and says at most once that a process is slow, until that changes."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: the host of each process, in order of rank."""
        self._hosts = hosts
        self._suspect: int | None = None
        self._intervals = 0

    def look(self, values: Mapping[str, float]) -> str | None:
        """The warning that an interval's values give rise to, if any."""
        slow = values.get("speed/slowest_ratio", 1.0) > MAX_RATIO
        suspect = int(values["speed/slowest_process"]) if slow else None
        self._intervals = self._intervals + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        if suspect is None or self._intervals != PATIENCE:
            return None
        return (
            f"process {suspect} on {self._hosts[suspect]} is slow: its forward pass takes "
            f"{values['speed/slowest_ratio']:.2f} times as long as the others', {PATIENCE} intervals in a row, and all "
            "wait for it. Look for another program on its device, for a device that is too hot, or leave the host out."
        )
