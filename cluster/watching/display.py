"""What a study shows while it runs: a line for what begins and ends, and a status line that is never old."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.files.folder import StudyFolder
from cluster.launch.ranks import started_at
from cluster.scheduling.driver import Watcher
from cluster.scheduling.jobs import Outcome, Placement, Resources, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.troubles import Failure, Retry
from cluster.watching.names import NodeNames
from cluster.words import count, duration
from data_pipeline.errors import DataError
from trainer.tracking.records import read_result

_LIVE_SECONDS, _LOG_SECONDS = 1.0, 8.0
_LOG_WIDTH = 400  # of a line where there is no terminal


class Display(Watcher):
    """Prints the study's progress: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, folder: StudyFolder, names: NodeNames) -> None:
        self._folder, self._names = folder, names
        self._began = time.monotonic()
        self._next = 0.0
        self._live = sys.stdout.isatty()
        self._starts: dict[str, float] = {}
        self._trials = dict(folder.trials)  # also those that are taken out of the study while they run

    def started(self, placement: Placement) -> None:
        job = placement.job
        self._trials |= self._folder.trials
        self._starts[job.key] = time.time()
        if isinstance(job, TrialJob):
            saved = self._folder.progress(job.key)
            since = f" from {saved:,} images" if saved else ""
            again = f", start {placement.attempt}" if placement.attempt > 1 else ""
            total = self._trials[job.key].total_images
            self.say(f"training   {self._size(job.key)}: {total:,} images{since}{self._where(placement)}{again}")

    def ended(self, outcome: Outcome, verdict: Retry | Failure | None) -> None:
        job = outcome.job
        seconds = duration(time.time() - self._starts.pop(job.key, time.time()))
        how = outcome.status.replace("_", " ")
        if isinstance(verdict, Retry):
            self.say(f"warning: {job.key}: {how} ({verdict.message}); tried again in {verdict.pause:g} s")
        elif isinstance(verdict, Failure):
            kind = "error" if verdict.state == "failed" else "warning"
            after = f" after {count(verdict.attempts, 'start')}, given up" if verdict.state == "failed" else ""
            self.say(f"{kind}: {job.key} {verdict.state}{after}: {verdict.message}")
        elif isinstance(job, TrialJob):
            self.say(f"trained    {self._size(job.key)} in {seconds}")
        elif job.shard[0] == 0:  # which writes the result of all shards
            self.say(
                f"evaluated  {self._size(job.trial)} at {job.nimg:>9,} images in {seconds}: {_values(job.out)}"
            )  # fmt: skip

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
        running, num = scheduler.running, len(scheduler.running_trials)
        trials, evaluations = scheduler.num_waiting
        head = (
            f"{duration(now - self._began)} | {num} training, {len(running) - num} evaluating, "
            f"waiting: {count(trials, 'trial')}, {count(evaluations, 'evaluation')}"
        )
        parts = (self._trial(running[name], several=len(nodes) > 1) for name in scheduler.running_trials)
        width = shutil.get_terminal_size().columns - 1 if self._live else _LOG_WIDTH
        line = fitted(head, parts, num, width)
        if self._live:
            _show(f"\r\x1b[K{line}", end="")
        else:
            _show(line)

    def say(self, text: str) -> None:
        """A line that stays."""
        _show(("\r\x1b[K" if self._live else "") + text)

    def end(self) -> None:
        if self._live:
            _show("\r\x1b[K", end="")

    def _size(self, name: str) -> str:
        trial = self._trials[name]
        return f"{trial.label:8} seed {trial.seed}" if len(self._folder.study.seeds) > 1 else f"{trial.label:8}"

    def _where(self, placement: Placement) -> str:
        return f" on {', '.join(map(self._names, placement.nodes))}"

    def _trial(self, placement: Placement, *, several: bool) -> str:
        """Of one that trains; `several`: there are other nodes where it could be."""
        name = placement.job.key
        trial, record = self._trials[name], self._folder.last_record(name)
        rest = (self._where(placement) if several else "") + (
            f", start {placement.attempt}" if placement.attempt > 1 else "")  # fmt: skip
        size = " ".join(self._size(name).split())
        if record is None or (started_at(self._folder.run_folder(name)) or 0.0) < self._starts.get(name, 0.0):
            return f"{size} starting{rest}"
        speed = record.values.get("speed/img_per_second", 0.0)
        left = duration((trial.total_images - record.nimg) / speed) if speed else "?"
        return (
            f"{size} {record.nimg:,}/{trial.total_images:,} img {record.nimg / trial.total_images:.0%} "
            f"{speed:,.0f} img/s ETA {left} loss {record.values.get('train/loss', float('nan')):.3f}{rest}"
        )


def fitted(head: str, parts: Iterable[str], num: int, width: int) -> str:
    """`head | part | part | +3 more`: as many of the `num` parts as `width` columns hold. No more are asked for."""
    line = head
    for left, part in zip(range(num, 0, -1), parts, strict=False):
        more = f" | +{left - 1} more" if left > 1 else ""
        if len(line) + 3 + len(part) + len(more) > width:
            return f"{line} | +{left} more"[:width]
        line += f" | {part}"
    return line[:width]


def _values(out: Path) -> str:
    """An evaluation's results in a line."""
    try:
        records = read_result(out)
    except (OSError, DataError):  # written elsewhere, and not to be seen here yet
        return f"see {out}"
    return ", ".join(
        f"{r.metric} {r.split} {r.value:.4g}" + (f" ± {r.stderr:.2g}" if r.stderr else "") for r in records
    )


def _show(text: str, end: str = "\n") -> None:
    """Print. A full disk under the output, or a reader that went away, stops no study."""
    with contextlib.suppress(OSError):
        print(text, end=end, flush=True)
