"""What is done with a logging interval's record: completed, written to the run's metrics, and warned about."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

from data_pipeline.progress import say
from trainer.config.run import RunConfig
from trainer.processes import Processes
from trainer.spikes import SpikeWatch
from trainer.straggler import StragglerWatch
from trainer.system import SystemMetrics
from trainer.tracking.records import RecordWriter, TrainRecord, read_train_records


class Journal:
    """One process's view of the run's records; the main process keeps them."""

    def __init__(self, folder: Path, nimg: int, config: RunConfig, processes: Processes) -> None:
        """Opens the segment that begins at nimg. All processes must call it together."""
        self._stragglers = StragglerWatch(processes.gather_objects(socket.gethostname()))
        self._spikes = SpikeWatch()
        self._last_nimg = 0
        self._writer: RecordWriter | None = None
        if processes.is_main:
            self._system = SystemMetrics(folder, processes.device)
            for record in read_train_records(folder):
                if record.nimg <= nimg:
                    self._is_spike(record)  # what was usual before the run was stopped
            self._writer = RecordWriter(folder, nimg)

    def write(self, record: TrainRecord) -> None:
        """Complete a record, write it, and say what is out of the ordinary about it. Main process only."""
        if self._writer is None:
            return
        spike, line = self._is_spike(record)
        values = record.values | self._system.values() | {"train/loss_spike": float(spike)}
        self._writer.write(replace(record, values=values))
        for warning in (line, self._stragglers.look(values)):
            if warning:
                say(f"warning: {warning}")
        skipped = record.values["train/skipped_steps"]
        if skipped:
            say(f"warning: {skipped:.0f} step(s) skipped up to {record.nimg:,} images: loss or gradient not finite")

    def _is_spike(self, record: TrainRecord) -> tuple[bool, str | None]:
        images, self._last_nimg = record.nimg - self._last_nimg, record.nimg
        loss = record.values.get("train/loss")
        return (False, None) if loss is None else self._spikes.look(record.nimg, loss, images)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
