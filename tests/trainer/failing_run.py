"""`trainer/run.py` in a job that comes to a bad end.

    python failing_run.py WHAT RANK --config ...

WHAT: memory (process RANK may take no more than 128 MiB beside what it has when its first step begins), disk (the disk
is full for its part of a checkpoint), storage (that part meets an error of the storage).
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path
from typing import Any

import trainer.checkpoint
import trainer.loop
from trainer.step_inputs import StepInputs

_, WHAT, RANK = sys.argv[:3]
write_mapping = trainer.checkpoint.write_mapping


class NarrowRun(trainer.loop.Run):
    def step(self, inputs: StepInputs) -> None:
        if self.nimg == 0:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), resource.RLIM_INFINITY))
        super().step(inputs)


def on_a_full_disk(*_: Any) -> Any:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"fragments")


def on_a_failing_disk(path: Path, *_: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


if __name__ == "__main__":
    if os.environ["RANK"] == RANK:
        if WHAT == "memory":
            trainer.loop.Run = NarrowRun  # type: ignore[misc]
        else:
            trainer.checkpoint.write_mapping = {"disk": on_a_full_disk, "storage": on_a_failing_disk}[WHAT]
    del sys.argv[1:3]
    sys.path.insert(0, sys.path[0])  # run.py replaces the first entry
    from trainer.run import command_line

    command_line()
