"""What people ask of a study while it runs: its file is edited, a trial is cancelled or given another chance, or all of
it is to stop. All of that comes as files, so it can be asked from wherever the storage is seen, and is never lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.definition.portable import remove_portable
from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial
from cluster.files.folder import StudyFolder
from cluster.files.verdicts import VERDICT, asked_to_stop, read_verdict
from cluster.scheduling.jobs import Changes
from data_pipeline.errors import UserError
from data_pipeline.files import mark_of

NEXT = "study.next"  # in the study's folder: what `update` writes there for a driver elsewhere
_LOOK_SECONDS = 2.0
_TRIAL_SECONDS = 0.03  # between two looks at all trials' folders, a trial: a look may take a tenth of it

Load = Callable[[Path], tuple[StudyConfig, list[Trial]]]
Fits = Callable[[StudyConfig, list[Trial]], None]
Mark = tuple[int, int]


class Edits:
    """Notices what is asked for. One for a driver's life."""

    def __init__(self, folder: StudyFolder, study_file: Path, load: Load, *, read_at: Mark | None = None) -> None:
        """What was asked of an earlier driver and not done by it is no longer asked.

        Args:
            load: reads a study file, with the command line's overrides where it is the command line's.
            read_at: the file's mark when it was read; default: that of now.
        """
        self._folder, self._file, self._load = folder, study_file.absolute(), load
        self._next = folder.path / f"{NEXT}.yaml"
        asked_to_stop(folder.path)
        remove_portable(self._next)
        self.fits: Fits = lambda study, trials: None  # raises UserError for what the cluster cannot hold
        self._seen = read_at or mark_of(self._file)
        self._ended = self._verdicts()
        self._look_at = self._verdicts_at = 0.0

    def look(self) -> Changes:
        """What is new since the last call; nothing more often than every two seconds."""
        if time.monotonic() < self._look_at:
            return Changes()
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if asked_to_stop(self._folder.path):
            return Changes(stop=True, told=("asked to stop: the running trials save first",))
        edited = self._edited()
        before = self._ended
        if time.monotonic() >= self._verdicts_at:
            self._verdicts_at = time.monotonic() + _TRIAL_SECONDS * len(self._folder.trials)
            self._ended = self._verdicts()
        cancelled = {name: why for name, why in self._ended.items() if name not in before}
        again = [name for name in before if name not in self._ended and name in self._folder.trials]
        for name in again:
            self._folder.forget_errors(name)
        told = [f"{name} ends here: {why}" for name, why in cancelled.items()]
        told += [f"{name} gets another chance" for name in again]
        return Changes(
            added=(*edited.added, *(self._folder.wanted(name) for name in again)),
            dropped={**edited.dropped, **cancelled}, told=(*edited.told, *told),
        )  # fmt: skip

    def _edited(self) -> Changes:
        if self._next.exists():
            changes = self._adopt(self._next)
            remove_portable(self._next)
            return changes
        now = mark_of(self._file)
        if now is None or now == self._seen:  # an editor may be between two files
            return Changes()
        self._seen = now
        return self._adopt(self._file)

    def _adopt(self, path: Path) -> Changes:
        """Take over a study file; one that is wrong changes nothing, and is told of."""
        try:
            study, trials = self._load(path)
            self.fits(study, trials)
            added, dropped = self._folder.adopt(study, trials)
        except Exception as error:  # whatever it is, the study that runs is none the worse for it
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return Changes(told=(f"warning: {path.name} has changed and is not taken over: {why}",))
        names = ", ".join([f"+{job.key}" for job in added] + [f"-{name}" for name in dropped]) or "no trial differs"
        why = "no longer in the study file"
        return Changes(added, dict.fromkeys(dropped, why), (f"{path.name} has changed: {names}",))

    def _verdicts(self) -> dict[str, str]:
        found = {}
        for name in self._folder.trials:
            run = self._folder.run_folder(name)
            if (run / VERDICT).exists() and (verdict := read_verdict(run)) is not None:
                found[name] = verdict.reason
        return found
