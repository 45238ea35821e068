"""The folder of a run: who may write to it, and what is kept where."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import AgreedError, ConfigError, UserError
from data_pipeline.files import held, write_json
from trainer.config.run import RunConfig, load_config
from trainer.config.tree import save_config
from trainer.exits import BusyError

# Sections and keys that may change between two lives of a run: they decide how and how long, not what.
_MAY_CHANGE = {"name", "run", "engine", "tracking"}
_MAY_CHANGE_IN = {
    "data": {"train", "num_threads", "prefetch"},
    "train": {
        "micro_batch", "budget_images", "budget_flops", "log_every_images", "checkpoint_every_images",
        "keep_checkpoints", "keep_every_images", "max_skipped_steps", "export_images", "sample_grid",
        "ema_snapshot_every_images", "ema_snapshot_precision",
    },
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def ema_snapshots(self) -> Path:
        return self.path / "ema_snapshots"

    @property
    def posthoc_ema(self) -> Path:
        return self.path / "posthoc_ema"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def started(self) -> Path:
        return self.path / "started.json"

    def write_started(self, nimg: int) -> None:
        """The first step of a life is done: {"time": in seconds since 1970, "nimg": after it, "pid": ...}."""
        write_json(self.started, {"time": time.time(), "nimg": nimg, "pid": os.getpid()})

    def read_result(self) -> dict[str, Any] | None:
        """What a finished run left, or None. Raises AgreedError, on all who read it, where it is damaged."""
        try:
            return _read_json(self.result, "Remove it: the same command then writes it anew")
        except FileNotFoundError:
            return None

    def write_result(self, value: dict[str, Any]) -> None:
        """The run is complete: the last file it writes."""
        write_json(self.result, value)

    def forget_result(self, is_main: bool) -> None:
        """The run goes on to a larger budget: it is no longer complete."""
        if is_main:
            self.result.unlink(missing_ok=True)

    def identity(self) -> dict[str, Any]:
        return _read_json(self.path / "run.json", "Remove it: the run then gets a new id, in MLflow a new run")

    def note_saved(self, nimg: int) -> None:
        """There is a checkpoint now: from here on a start without one is a mistake."""
        write_json(self.path / "run.json", self.identity() | {"saved_images": nimg})

    def check_not_emptied(self) -> None:
        """Raises UserError where checkpoints were written and none is left: starting afresh would lose the run."""
        saved = self.identity().get("saved_images")
        if saved:
            raise UserError(
                f"{self.checkpoints} holds no checkpoint, but the run had one at {saved:,} images. Bring them back (is "
                f"the disk mounted?), or move {self.path} away to start afresh."
            )

    def open(self, config: RunConfig, facts: dict[str, Any]) -> None:
        """Create the folder's config and identity, or check that they are this run's. Main process only.

        Raises ConfigError naming each setting in which the folder's run differs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for written in (self.checkpoints, self.exports, self.ema_snapshots):
            for unfinished in written.glob(".*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)  # an earlier life was killed while it wrote
        stored = self.path / "config.yaml"
        if stored.exists():
            check_same_run(load_config(stored), config, self.path)
        identity = self.path / "run.json"
        before = self.identity() if identity.exists() else {"id": uuid.uuid4().hex}
        who = before | {"name": config.name, "seed": config.seed, "tags": config.tracking.tags}
        with naming_a_full_disk(self.path):
            save_config(config, stored)
            write_json(identity, who | facts)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one job. Released when the process ends.

        Raises BusyError when another job has it, UserError where there can be no folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"run.folder={self.path} cannot be made: {error.filename} is, or lies in, a file and not a folder. "
                "Choose another run.folder=..., or move that file away."
            ) from None
        with naming_a_full_disk(self.path), held(self.path / "run.lock", self._in_use):
            yield

    def _in_use(self, holder: str) -> BusyError:
        return BusyError(
            f"{self.path} is in use by {holder}: two jobs on one run folder would spoil it. "
            "Wait for it or stop it, or choose another run.folder=..."
        )


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Where an error that the disk is full comes from a write, and so names no file, it names the run's folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(folder)
        raise


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # also what is no UTF-8
        raise AgreedError(f"{path} is damaged ({error}). {remedy}.") from None
    if not isinstance(value, dict):
        raise AgreedError(f"{path} is damaged (no JSON object). {remedy}.")
    return value


def _may_change(section: str, config: RunConfig) -> set[str]:
    """A section's keys that may; where the learning rate falls towards the budget's end, that end stays."""
    keys = _MAY_CHANGE_IN.get(section, set())
    return keys if config.train.lr_decay == "none" else keys - {"budget_images", "budget_flops"}


def _differing(old: RunConfig, new: RunConfig) -> list[str]:
    """The settings that differ and may not, as `section.key: before -> after`."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    differing = []
    for section in (name for name in after if name not in _MAY_CHANGE):
        if not isinstance(after[section], dict):
            pairs = {section: (before[section], after[section])}
        else:
            keys = [key for key in before[section] | after[section] if key not in _may_change(section, new)]
            pairs = {f"{section}.{key}": (before[section].get(key), after[section].get(key)) for key in keys}
        differing += [f"{key}: {was} -> {now}" for key, (was, now) in pairs.items() if was != now]
    return differing


def check_same_run(old: RunConfig, new: RunConfig, path: Path) -> None:
    """Raises ConfigError, naming each setting, where `new` would not continue the run of `old` in `path`."""
    if old.model.name != new.model.name:  # another network: what else differs follows from it
        differing = [f"model.name: {old.model.name} -> {new.model.name}"]
    else:
        differing = _differing(old, new)
    if differing:
        raise ConfigError(
            f"{path} holds a run with other settings:\n  " + "\n  ".join(differing)
            + "\nSet them back to continue it, or choose another run.folder=... for a new run."
        )  # fmt: skip
