"""Run by the ranks of a test job: trains a tiny network once per scenario, in one process life.

    python tests/trainer/train_scenarios.py SCENARIOS.json

A scenario is the list of overrides of one run; runs follow each other in the given order.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from trainer.config.run import load_config
from trainer.loop import train
from trainer.processes import StopRequest, start_processes
from trainer.watchdog import Watchdog

if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    processes = start_processes(num_cpu_threads=1)
    watchdog = Watchdog.start(processes, hang_seconds=0)
    for overrides in spec["runs"]:
        code = train(load_config(Path(spec["config"]), overrides), processes, StopRequest(), watchdog)
        assert code == 0, (overrides, code)
    watchdog.stop()
    sys.stdout.flush()
    os._exit(0)
