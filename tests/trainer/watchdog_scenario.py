"""One process of a stand-in job: a watchdog and a main thread that does what it is told. Standard library only.

    python watchdog_scenario.py RENDEZVOUS_FILE HANG_SECONDS DEAD_SECONDS WORD ...

The words of this process are joined by commas in the argument of its rank: compute, save (phases at 8 images),
late (compute at 0 images), step (four seconds of steps), wait, mistake, crash, torn (a collective operation breaks),
blocked (the main thread keeps the interpreter to itself), finish.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer.watchdog as module
from data_pipeline.errors import DataError, UserError
from trainer.watchdog import Watchdog


@dataclass(frozen=True)
class Processes:
    """What the watchdog needs of `trainer.processes.Processes`, by way of a file."""

    rank: int
    world_size: int
    rendezvous: Path

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, make: Any) -> Any:
        if self.is_main:
            part = self.rendezvous.with_suffix(".part")
            part.write_text(json.dumps(make()))
            part.rename(self.rendezvous)
        while not self.rendezvous.exists():
            time.sleep(0.01)
        return json.loads(self.rendezvous.read_text())


def main() -> int:
    rendezvous, hang_seconds, dead_seconds, *plans = sys.argv[1:]
    rank = int(os.environ["RANK"])
    module.BEAT_SECONDS, module.DEAD_SECONDS, module.LEAVE_SECONDS = 0.1, float(dead_seconds), 0.5
    processes = Processes(rank, int(os.environ["WORLD_SIZE"]), Path(rendezvous))
    with Watchdog.start(processes, hang_seconds=float(hang_seconds)) as watchdog:  # type: ignore[arg-type]
        print("ready", flush=True)
        for word in plans[rank].split(","):
            if word in ("compute", "save"):
                watchdog.at(8, word)
            elif word == "late":
                watchdog.at(0, "compute")
            elif word == "step":
                for number in range(400):
                    watchdog.at(number, "compute")
                    time.sleep(0.01)
            elif word == "wait":
                time.sleep(120)
            elif word == "blocked":
                sys.setswitchinterval(1000)
                while True:
                    pass
            elif word == "mistake":
                raise DataError("sample 7 is damaged")
            elif word == "crash":
                raise RuntimeError("boom")
            elif word == "torn":
                raise RuntimeError("[gloo] Connection closed by peer")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except UserError:
        code = 2
    except RuntimeError:
        code = 1
    os._exit(code)
