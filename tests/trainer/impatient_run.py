"""`trainer/run.py` with a watchdog that takes three seconds of silence for death, so that tests need not wait."""

from __future__ import annotations

import sys

import trainer.watchdog

trainer.watchdog.DEAD_SECONDS = 3.0
trainer.watchdog.BEAT_SECONDS = 0.2

if __name__ == "__main__":
    sys.path.insert(0, sys.path[0])  # run.py replaces the first entry
    from trainer.run import command_line

    command_line()
