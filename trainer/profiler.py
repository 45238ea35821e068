"""Traces a few steps into RUN/profile: `engine.profile_steps=5`.

A trace is a gzipped Chrome trace of the CPU's and the GPU's work, with shapes and memory, one a process; it opens in
https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.processes import Processes

WARMUP_STEPS = 3  # compilation, the allocator and cudnn's choices are done by then


class StepProfiler:
    """Is told of every step's end; with `steps` = 0, and once the steps are traced, that costs nothing."""

    def __init__(self, folder: Path, steps: int, processes: Processes) -> None:
        """`folder`: the run's; `steps`: how many to trace."""
        self._folder, self._processes = folder / "profile", processes
        self._first, self._last = WARMUP_STEPS, WARMUP_STEPS + steps
        self._seen = 0  # steps of this life
        self._profile: profile | None = None

    def step(self, nimg: int) -> None:
        """At the end of the step that ends at nimg."""
        if self._first == self._last or self._seen >= self._last:
            return
        self._seen += 1
        if self._seen == self._first:
            activities = [ProfilerActivity.CPU]
            if self._processes.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()
        if self._seen == self._last:
            self.close(nimg)

    def close(self, nimg: int) -> None:
        """Write what was traced so far, if a trace is open: a run may end or stop within it."""
        traced, self._profile = self._profile, None
        if traced is None:
            return
        if self._processes.device.type == "cuda":
            torch.cuda.synchronize()
        traced.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{nimg}.rank{self._processes.rank}.json.gz"
        traced.export_chrome_trace(str(path))
        print(f"profile of {self._seen - self._first} steps: {path} (opens in https://ui.perfetto.dev)", flush=True)
