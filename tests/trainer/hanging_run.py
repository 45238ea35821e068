"""`impatient_run.py` in which the data of process 1 never come after some steps."""

from __future__ import annotations

import os
import sys
import time

import impatient_run  # noqa: F401

from trainer.inputs import InputSource
from trainer.step_inputs import StepInputs


class HangingSource(InputSource):
    def make(self, nimg: int) -> StepInputs:
        if nimg >= 80 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return super().make(nimg)


if __name__ == "__main__":
    import trainer.inputs

    trainer.inputs.InputSource = HangingSource  # type: ignore[misc]
    sys.path.insert(0, sys.path[0])  # run.py replaces the first entry
    from trainer.run import command_line

    command_line()
