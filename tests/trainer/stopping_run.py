"""`impatient_run.py` that is slow, or stuck, where a stop request finds it.

    python stopping_run.py WHAT GRACE_SECONDS --config ...

WHAT: save=SECONDS (writing a checkpoint takes so long), grid (told to stop in the third step; drawing a grid never
ends then), hang (the data of process 1 never come after some steps), no_metrics (the disk is full for them).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import impatient_run  # noqa: F401

import trainer.inputs
import trainer.loop
import trainer.processes
import trainer.saver
import trainer.tracking.records
from trainer.inputs import InputSource
from trainer.outputs import Outputs
from trainer.step_inputs import StepInputs

_, WHAT, _GRACE = sys.argv[:3]
write_checkpoint = trainer.saver.write_checkpoint


def slow_save(*arguments: Any) -> Path:
    print("saving", flush=True)
    time.sleep(float(WHAT.partition("=")[2]))
    return write_checkpoint(*arguments)


class HangingSource(InputSource):
    def make(self, nimg: int) -> StepInputs:
        if nimg >= 80 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return super().make(nimg)


class StoppedRun(trainer.loop.Run):
    def step(self, inputs: StepInputs) -> None:
        super().step(inputs)
        if self.nimg == 16:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # to be heard
            Outputs.draw_samples = lambda _: time.sleep(1000)  # type: ignore[method-assign,assignment,return-value]


if __name__ == "__main__":
    trainer.processes.GRACE_SECONDS = float(_GRACE)
    if WHAT.startswith("save"):
        trainer.saver.write_checkpoint = slow_save
    elif WHAT == "hang":
        trainer.loop.InputSource = HangingSource  # type: ignore[misc]
    elif WHAT == "grid":
        trainer.loop.Run = StoppedRun  # type: ignore[misc]
    elif WHAT == "no_metrics":
        trainer.tracking.records.open = lambda *_, **__: open("/dev/full", "w")  # type: ignore[attr-defined]  # noqa: SIM115
    del sys.argv[1:3]
    sys.path.insert(0, sys.path[0])  # run.py replaces the first entry
    from trainer.run import command_line

    command_line()
