"""The device's time, told without making the program wait for the device."""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event


class Clock:
    """Moments of a device: on a GPU events in its current stream, elsewhere the host's time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Moment:
        """When the device has come so far."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Moment, end: Moment) -> float:
        """From one moment to another. On a GPU it waits until the device has been there: ask late."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
