"""Run by the ranks of a test job: `train_scenarios.py` with losses that are made NaN.

    python tests/trainer/poisoned_scenarios.py SCENARIOS.json

"poison": [[rank, first image, last image]]: that process's losses of the steps that begin there are NaN.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import trainer.loop as loop
from data_pipeline.errors import UserError
from trainer.config.run import load_config
from trainer.loop import Run, train
from trainer.processes import StopRequest, start_processes
from trainer.watchdog import Watchdog

if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    processes = start_processes(num_cpu_threads=1)
    watchdog = Watchdog.start(processes, hang_seconds=0)
    now = {"nimg": 0}
    make_losses, step = loop.training_losses, Run.step

    drawn: dict[int, list[int]] = {}  # by the step's first image: the last process's timesteps

    def poisoned_step(self: Run, inputs: Any) -> None:
        now["nimg"] = self.nimg
        step(self, inputs)
        drawn[self.nimg] = torch.cat([micro.t for micro in self.last_step]).tolist()

    def poisoned_losses(*arguments: Any, **named: Any) -> Any:
        losses = make_losses(*arguments, **named)
        if any(r == processes.rank and first <= now["nimg"] <= last for r, first, last in spec["poison"]):
            return dataclasses.replace(losses, loss=losses.loss * torch.nan)
        return losses

    Run.step = poisoned_step  # type: ignore[method-assign]
    loop.training_losses = poisoned_losses
    for overrides in spec["runs"]:
        try:
            train(load_config(Path(spec["config"]), overrides), processes, StopRequest(), watchdog)
        except UserError as error:
            if processes.is_main:
                print(f"error: {error}")
    if not processes.is_main:
        (Path(sys.argv[1]).parent / "drawn.json").write_text(json.dumps(drawn))
    watchdog.stop()
    sys.stdout.flush()
    os._exit(0)
