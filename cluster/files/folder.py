"""The folder of a study, and what its files prove: which trials are complete, which evaluations are missing.

STUDY/ study.yaml (with its run configs: all that `run` needs)  study.lock  trials/<trial>/ (run folders)  law/
       events.jsonl (what happened, over all drivers)  status.json (what the driver knows)  summary.txt
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.definition.portable import save_portable
from cluster.definition.shapes import eval_shape, trial_shapes
from cluster.definition.spec import StudyConfig
from cluster.definition.trials import Trial, trial_config
from cluster.files.divergence import ErrorWatch
from cluster.files.verdicts import State, forgiven_until, read_verdict, write_verdict
from cluster.planning.costs import evaluation_seconds, trial_seconds
from cluster.scheduling.jobs import Changes, EvalJob, TrialJob
from data_pipeline.errors import ConfigError, UserError
from data_pipeline.files import held, is_locked, write_json
from trainer.checkpoint import list_checkpoints
from trainer.config.run import RunConfig, load_config
from trainer.config.tree import save_config
from trainer.memory import divisors
from trainer.run_folder import check_same_run
from trainer.tracking.records import EvalRecord, TrainRecord, read_result, segments

MICRO_BATCH = "micro_batch.json"  # in a run's folder: what it was reduced to after running out of memory
_ERROR_SECONDS = 5.0  # between two looks at a trial's errors
_LOOK_SECONDS = 0.003  # what one look at a folder may take on a slow file system; a tenth of the time is spent so


class StudyFolder:
    """Paths and facts of one study."""

    def __init__(self, path: Path, study: StudyConfig, trials: Sequence[Trial]) -> None:
        self.path = path.absolute()
        self.study = study
        self.trials = {trial.name: trial for trial in trials}
        self.look_for_changes: Callable[[], Changes] = Changes
        self._exports_seen: dict[str, int] = {}  # when the folder of exports last changed
        self._errors: dict[str, ErrorWatch] = {}
        self._look_at = {"exports": 0.0, "errors": 0.0}

    def run_folder(self, trial: str) -> Path:
        return self.path / "trials" / trial

    @property
    def law(self) -> Path:
        return self.path / "law"

    def lock(self) -> AbstractContextManager[None]:
        """Hold the study for one driver. Raises UserError when another has it."""
        return held(
            self.path / "study.lock",
            lambda holder: UserError(
                f"the study in {self.path} is being driven by {holder}. Wait for it, watch it with `python -m "
                "cluster.study status`, or give another folder with --out."
            ),
        )

    def driver(self) -> str | None:
        """Who drives the study now; None where nobody does."""
        path = self.path / "study.lock"
        if not path.exists() or not is_locked(path):
            return None
        return path.read_text(encoding="utf-8").strip() or "another process"

    def prepare(self) -> list[TrialJob]:
        """Write the study's config and each trial's, and return the trials as jobs.

        Raises ConfigError, before anything is written, where a trial's folder holds another run.
        """
        configs = {name: self._checked_config(trial) for name, trial in self.trials.items()}
        for name, config in configs.items():
            save_config(config, self.run_folder(name) / "trial.yaml")
        save_portable(self.study, self.path)
        return [self.wanted(name) for name in self.trials]

    def forget_errors(self, trial: str) -> None:
        """A trial has another chance: what it did before no longer speaks against it."""
        self._errors.pop(trial, None)

    def adopt(self, study: StudyConfig, trials: Sequence[Trial]) -> tuple[tuple[TrialJob, ...], tuple[str, ...]]:
        """Be another study from here on, one whose trials continue this one's.

        Returns the trials that are new or changed, and the names of those that are no more. Raises ConfigError, and
        nothing changes, where it is another study or a trial would be another run.
        """
        if study.name != self.study.name:
            raise ConfigError(f"name={study.name}: a running study keeps its name, {self.study.name}.")
        other = StudyFolder(self.path, study, trials)
        jobs = {job.key: job for job in other.prepare()}
        alike = (study.resources, study.evaluation) == (self.study.resources, self.study.evaluation)
        changed = [name for name, trial in other.trials.items() if not alike or self.trials.get(name) != trial]
        dropped = tuple(name for name in self.trials if name not in other.trials)
        self.study, self.trials = other.study, other.trials
        self._exports_seen.clear()
        self._errors.clear()  # the rule may be another
        return tuple(jobs[name] for name in changed), dropped

    def job(self, name: str) -> TrialJob | None:
        return self.wanted(name) if name in self.trials else None

    def wanted(self, name: str) -> TrialJob:
        """A trial of the study as a job, with the time that is left of it."""
        trial = self.trials[name]
        left = 1.0 - min(1.0, self.progress(name) / trial.total_images)
        seconds = trial_seconds(self.study, trial) * left
        shapes = trial_shapes(self.study, trial)
        return TrialJob(name, self.run_folder(name), shapes, seconds, trial.priority, trial.total_images)

    def _checked_config(self, trial: Trial) -> RunConfig:
        folder = self.run_folder(trial.name)
        config = trial_config(trial, folder)
        if (folder / "config.yaml").exists():  # also where the trial is finished and would not look itself
            check_same_run(load_config(folder / "config.yaml"), config, folder)
        return _with_micro_batch(config, _reduced_to(folder))

    # ---- the driver's questions: StudyFiles ---------------------------------------------------------------------

    def exported(self, trials: Iterable[str]) -> list[str]:
        """Those whose folder of exports has changed since this was last asked; looked at as often as that is cheap."""
        trials = list(trials)
        if not self._is_time("exports", 10 * _LOOK_SECONDS * len(trials)):
            return []
        return [name for name in trials if self._exports_changed(name)]

    def _exports_changed(self, trial: str) -> bool:
        try:
            mark = (self.run_folder(trial) / "exports").stat().st_mtime_ns
        except OSError:
            return False
        before, self._exports_seen[trial] = self._exports_seen.get(trial), mark
        return mark != before

    def progress(self, trial: str) -> int:
        """Images of the newest checkpoint."""
        newest = list_checkpoints(self.run_folder(trial) / "checkpoints")[:1]
        return int(newest[0].name) if newest else 0

    def diverging(self, trials: Iterable[str]) -> Mapping[str, str]:
        rule, trials = self.study.early_stop, list(trials)
        if rule is None or not self._is_time("errors", max(_ERROR_SECONDS, 10 * _LOOK_SECONDS * len(trials))):
            return {}
        found = {}
        for name in trials:
            run = self.run_folder(name)
            if name not in self._errors:
                self._errors[name] = ErrorWatch(rule, after=forgiven_until(run))
            why = self._errors[name].look(run)
            if why is not None:
                found[name] = why
        return found

    def verdict(self, trial: str) -> str | None:
        verdict = read_verdict(self.run_folder(trial))
        return None if verdict is None else verdict.reason

    def end_trial(self, trial: str, state: State, reason: str) -> None:
        record = self.last_record(trial)
        with contextlib.suppress(OSError):  # on a full disk the next driver will see for itself
            write_verdict(self.run_folder(trial), state, reason, record.nimg if record else 0)

    def shrink_micro_batch(self, trial: str) -> str | None:
        folder, num_processes = self.run_folder(trial), self.study.resources.num_processes
        config = load_config(folder / "trial.yaml")
        share = config.train.global_batch // num_processes
        before = config.train.micro_batch or share
        smaller = [n for n in divisors(share) if n <= before // 2]
        if (folder / MICRO_BATCH).exists() or not smaller:
            return None
        try:
            write_json(folder / MICRO_BATCH, {"micro_batch": max(smaller), "before": before})
            save_config(_with_micro_batch(config, max(smaller)), folder / "trial.yaml")
        except OSError as error:  # a full disk
            return f"its micro-batch could not be made smaller: {error}"
        return f"micro-batch {max(smaller)} instead of {before}, the global batch stays {config.train.global_batch}"

    def changes(self) -> Changes:
        return self.look_for_changes()

    def _is_time(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._look_at[what]:
            return False
        self._look_at[what] = now + seconds
        return True

    # ---- what files prove ---------------------------------------------------------------------------------------

    def trial_done(self, trial: str) -> bool:
        """Has the run reached this study's budget? (A longer one in the study file makes it go on.)"""
        result = self.run_folder(trial) / "result.json"
        try:
            return bool(json.loads(result.read_text())["nimg"] >= self.trials[trial].total_images)
        except FileNotFoundError:
            return False

    def proved(self, job: TrialJob | EvalJob) -> bool:
        if isinstance(job, EvalJob):
            return job.out.name in _names_in(job.out.parent)
        return job.key in self.trials and self.trial_done(job.key)

    def shows_all(self, trial: str) -> bool:
        if trial not in self.trials:
            return True
        return self.trial_done(trial) and len(self.exports(trial)) == len(self.trials[trial].export_images)

    def exports(self, trial: str) -> list[Path]:
        """Those of the points to be evaluated that are there and complete."""
        folder = self.run_folder(trial) / "exports"
        there, wanted = _names_in(folder), [f"{nimg:012d}" for nimg in self.trials[trial].export_images]
        return [folder / name for name in wanted if name in there and (folder / name / "manifest.json").exists()]

    def missing_evaluations(self, trial: str) -> list[EvalJob]:
        facts = self.trials.get(trial)  # None: it was taken out of the study
        if facts is None or not facts.evaluated or self._is_cancelled(trial):
            return []
        jobs = []
        for export in self.exports(trial):
            there = _names_in(self.run_folder(trial) / "evals" / export.name)
            jobs += [job for job in self._jobs(facts, export) if job.out.name not in there]
        return jobs

    def _is_cancelled(self, trial: str) -> bool:
        verdict = read_verdict(self.run_folder(trial))
        return verdict is not None and verdict.state == "cancelled"

    def current_records(self, trial: str) -> list[EvalRecord]:
        """The records of the trial's evaluations as this study file asks for them; others are left aside."""
        facts = self.trials[trial]
        records: list[EvalRecord] = []
        for export in self.exports(trial) if facts.evaluated else ():
            there = _names_in(self.run_folder(trial) / "evals" / export.name)
            for out in dict.fromkeys(job.out for job in self._jobs(facts, export)):
                if out.name in there:
                    records += read_result(out)
        return records

    def num_evaluations(self, trial: str) -> int:
        """How many evaluations the study wants of a trial."""
        return sum(self.num_requests(trial, nimg) for nimg in self.trials[trial].export_images)

    def num_requests(self, trial: str, nimg: int) -> int:
        """How many evaluations the study wants of one export."""
        facts = self.trials[trial]
        return len(requests(self.study, facts, nimg)) if facts.evaluated else 0

    def is_training(self, trial: str) -> bool:
        """Does a training process hold the run's folder?"""
        path = self.run_folder(trial) / "run.lock"
        return path.exists() and is_locked(path)

    def last_record(self, trial: str) -> TrainRecord | None:
        """The newest training record, from the end of the newest segment."""
        found = segments(self.run_folder(trial))
        line = _last_line(found[-1][1]) if found else b""
        return TrainRecord(**json.loads(line)) if line else None

    def _jobs(self, trial: Trial, export: Path) -> list[EvalJob]:
        """One job a shard of every evaluation; all shards of one are proved done by the same file."""
        nimg = int(export.name)
        wanted = requests(self.study, trial, nimg)
        shape, num_shards = eval_shape(self.study), self.study.resources.eval_shards
        expected = evaluation_seconds(self.study, trial, last=nimg == trial.total_images)
        jobs = []
        for request, seconds in zip(wanted, expected, strict=True):
            key = _key(request, _network(export, request.weights))
            out = self.run_folder(trial.name) / "evals" / export.name / f"{key}.json"
            for shard in range(num_shards):
                name = f"{trial.name}/{export.name}/{key}" + (f" {shard + 1}/{num_shards}" if num_shards > 1 else "")
                place = (shard, num_shards)
                jobs.append(
                    EvalJob(name, trial.name, nimg, export, out, request, place, (shape,), seconds, trial.priority)
                )
        return jobs


def requests(study: StudyConfig, trial: Trial, nimg: int) -> list[Any]:
    """What is measured at a point of a trial, as `EvalRequest`s."""
    from evaluation.nll.settings import NllSettings
    from evaluation.request import EvalRequest

    wanted = study.evaluation
    folders = {"test": wanted.test, "train": trial.config.data.train}
    threads = None if study.resources.eval_gpus else max(1, int(study.resources.eval_cpus))
    common: dict[str, Any] = {"weights": wanted.weights, "seed": wanted.seed, "num_threads": threads}
    found = []
    if wanted.nll is not None:
        calls = {"test": wanted.nll.num_calls, "train": wanted.nll.train_num_calls or wanted.nll.num_calls}
        for split in wanted.nll.splits:
            nll = NllSettings(num_calls=calls[split], target_stderr=wanted.nll.target_stderr)
            found.append(EvalRequest(data=folders[split], metrics=("nll",), nll=nll, **common))
    distance = wanted.distance
    if distance is not None and (distance.points == "all" or nimg == trial.total_images):
        request = EvalRequest(
            data=folders[distance.split], metrics=distance.metrics, sampling=distance.sampling,
            num_samples=distance.num_samples, repeats=distance.repeats, batch=distance.batch,
            num_reference=distance.num_reference, reference=distance.reference, feature_net=distance.feature_net,
            feature_weights=distance.feature_weights, train_data=folders["train"], **common,
        )  # fmt: skip
        found.append(request)
    return found


@lru_cache(maxsize=65536)
def _key(request: Any, network: str) -> str:
    """`EvalRequest.key`, which reads the data's manifest; asked for at every look at the folder."""
    key: str = request.key(network)
    return key


@lru_cache(maxsize=4096)
def _network(export: Path, weights: str) -> str:
    """What names an export's network; an export never changes."""
    from evaluation.subject import identity_in_manifest

    return identity_in_manifest(json.loads((export / "manifest.json").read_text())["files"], weights)


def _with_micro_batch(config: RunConfig, micro_batch: int | None) -> RunConfig:
    if micro_batch is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def _reduced_to(run: Path) -> int | None:
    """The micro-batch that a run was reduced to, if it was."""
    try:
        return int(json.loads((run / MICRO_BATCH).read_text())["micro_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _names_in(folder: Path) -> set[str]:
    """What a folder holds. Listing it makes a shared file system look anew; asking for one file may be answered from
    what it remembers, which can be a minute old.
    """
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _last_line(path: Path) -> bytes:
    """The last complete line of a file."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 16384))
        lines = file.read().split(b"\n")
    return lines[-2] if len(lines) >= 2 else b""
