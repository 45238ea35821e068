"""What a study shows while it runs: a line for what begins and ends, and a status line that is never old."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

from cluster.driver import Watcher
from cluster.folder import StudyFolder
from cluster.jobs import Outcome, Placement, Resources, TrialJob
from cluster.scheduler import Scheduler
from cluster.troubles import Failure, Retry
from cluster.words import duration

_LIVE_SECONDS, _LOG_SECONDS = 1.0, 8.0


class Display(Watcher):
    """Prints the study's progress: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self._next = 0.0
        self._live = sys.stdout.isatty()
        self._starts: dict[str, float] = {}

    def started(self, placement: Placement) -> None:
        job = placement.job
        self._starts[job.key] = time.monotonic()
        if isinstance(job, TrialJob):
            trial, record = self._folder.trials[job.key], self._folder.last_record(job.key)
            since = f" from {record.nimg:,} images" if record else ""
            self.say(f"training   {trial.label:8} seed {trial.seed}: {trial.total_images:,} images{since}")

    def ended(self, outcome: Outcome, verdict: Retry | Failure | None) -> None:
        job = outcome.job
        seconds = duration(time.monotonic() - self._starts.pop(job.key, time.monotonic()))
        if isinstance(verdict, Retry):
            self.say(
                f"warning: {job.key} failed ({verdict.message}); attempt {verdict.attempt + 1} in {verdict.pause:g} s"
            )
        elif isinstance(verdict, Failure):
            how = f"failed {verdict.attempts} times, given up" if verdict.state == "failed" else verdict.state
            self.say(f"{'error' if verdict.state == 'failed' else 'warning'}: {job.key} {how}: {verdict.message}")
        elif isinstance(job, TrialJob):
            self.say(f"trained    {self._folder.trials[job.key].label:8} in {seconds}")
        elif job.shard[0] == 0:  # which writes the result of all shards
            found = json.loads(job.out.read_text())["records"]
            values = ", ".join(
                f"{r['metric']} {r['split']} {r['value']:.4g}" + (f" ± {r['stderr']:.2g}" if r["stderr"] else "")
                for r in found
            )
            self.say(
                f"evaluated  {self._folder.trials[job.trial].label:8} at {job.nimg:>9,} images in {seconds}: {values}"
            )

    def nodes(self, joined: Sequence[str], lost: Sequence[str]) -> None:
        for names, what in ((joined, "joined"), (lost, "lost")):
            if names:
                self.say(f"nodes {what}: {', '.join(names)}")

    def told(self, text: str) -> None:
        self.say(text)

    def tick(self, scheduler: Scheduler, nodes: Mapping[str, Resources]) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_LIVE_SECONDS if self._live else _LOG_SECONDS)
        running = [self._trial(key) for key in scheduler.running_trials]
        evaluating = len(scheduler.running) - len(running)
        trials, evaluations = scheduler.num_waiting
        counts = f"{evaluating} evaluating, waiting: {trials} trials, {evaluations} evaluations"
        line = " | ".join([duration(now - self._began), *running, counts])
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        print(("\r\x1b[K" if self._live else "") + text, flush=True)

    def end(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", flush=True)

    def _trial(self, name: str) -> str:
        trial, record = self._folder.trials[name], self._folder.last_record(name)
        if record is None:
            return f"{trial.label} starting"
        speed = record.values.get("speed/img_per_second", 0.0)
        left = (trial.total_images - record.nimg) / speed if speed else 0.0
        return (
            f"{trial.label} {record.nimg:,}/{trial.total_images:,} img {record.nimg / trial.total_images:.0%} "
            f"{speed:,.0f} img/s ETA {duration(left)} loss {record.values.get('train/loss', float('nan')):.3f}"
        )
