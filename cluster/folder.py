"""The folder of a study, and what its files prove: which trials are complete, which evaluations are missing.

STUDY/ study.yaml (resolved)  study.lock  trials/<trial>/ (run folders)  points.csv  law/ (fits, figures, report)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.jobs import EvalJob, TrialJob
from cluster.plan import eval_resources, evaluation_flops, trial_resources, trial_seconds
from cluster.spec import StudyConfig
from cluster.trials import Trial, trial_config
from data_pipeline.errors import UserError
from trainer.config import load_config, save_config
from trainer.run_folder import check_same_run
from trainer.tracking.records import EvalRecord, TrainRecord, read_result, segments


class StudyFolder:
    """Paths and facts of one study."""

    def __init__(self, path: Path, study: StudyConfig, trials: Sequence[Trial]) -> None:
        self.path = path.absolute()
        self.study = study
        self.trials = {trial.name: trial for trial in trials}
        self._exports_seen: dict[str, int] = {}

    def run_folder(self, trial: str) -> Path:
        return self.path / "trials" / trial

    @property
    def law(self) -> Path:
        return self.path / "law"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study for one driver. Raises UserError when another has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "study.lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"the study in {self.path} is being driven by {file.read().strip() or 'another process'}. Wait for "
                    "it, watch it with `python -m cluster.study status`, or give another folder with --out."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    def prepare(self) -> list[TrialJob]:
        """Write the study's config and each trial's, and return the trials as jobs."""
        save_config(self.study, self.path / "study.yaml")
        return [self._prepare(trial) for trial in self.trials.values()]

    def _prepare(self, trial: Trial) -> TrialJob:
        folder = self.run_folder(trial.name)
        config = trial_config(trial, folder)
        if (folder / "config.yaml").exists():  # also where the trial is finished and would not look itself
            check_same_run(load_config(folder / "config.yaml"), config, folder)
        save_config(config, folder / "trial.yaml")
        return TrialJob(
            trial.name, folder, self.study.resources.num_processes, trial_resources(self.study),
            trial_seconds(self.study, trial),
        )  # fmt: skip

    # ---- what files prove ---------------------------------------------------------------------------------------

    def trial_done(self, trial: str) -> bool:
        """Has the run reached this study's budget? (A longer one in the study file makes it go on.)"""
        result = self.run_folder(trial) / "result.json"
        return result.exists() and json.loads(result.read_text())["nimg"] >= self.trials[trial].total_images

    def missing_evaluations(self, trial: str) -> list[EvalJob]:
        facts = self.trials[trial]
        if not facts.evaluated:
            return []
        exports = [self.run_folder(trial) / "exports" / f"{nimg:012d}" for nimg in facts.export_images]
        jobs = [job for export in exports if (export / "manifest.json").exists() for job in self._jobs(facts, export)]
        return [job for job in jobs if not job.out.exists()]

    def current_records(self, trial: str) -> list[EvalRecord]:
        """The records of the trial's evaluations as this study file asks for them; others are left aside."""
        facts = self.trials[trial]
        records: list[EvalRecord] = []
        for nimg in facts.export_images if facts.evaluated else ():
            export = self.run_folder(trial) / "exports" / f"{nimg:012d}"
            if (export / "manifest.json").exists():
                for out in dict.fromkeys(job.out for job in self._jobs(facts, export)):
                    if out.exists():
                        records += read_result(out)
        return records

    def num_evaluations(self, trial: str) -> int:
        """How many evaluations the study wants of a trial."""
        return sum(self.num_requests(trial, nimg) for nimg in self.trials[trial].export_images)

    def num_requests(self, trial: str, nimg: int) -> int:
        """How many evaluations the study wants of one export."""
        facts = self.trials[trial]
        return len(requests(self.study, facts, nimg)) if facts.evaluated else 0

    def last_record(self, trial: str) -> TrainRecord | None:
        """The newest training record, from the end of the newest segment."""
        found = segments(self.run_folder(trial))
        line = _last_line(found[-1][1]) if found else b""
        return TrainRecord(**json.loads(line)) if line else None

    def _jobs(self, trial: Trial, export: Path) -> list[EvalJob]:
        """One job a shard of every evaluation; all shards of one are proved done by the same file."""
        nimg = int(export.name)
        wanted = requests(self.study, trial, nimg)
        resources, num_shards = eval_resources(self.study), self.study.resources.eval_shards
        devices = (resources.gpus or resources.cpus) * num_shards
        work = evaluation_flops(self.study, trial, last=nimg == trial.total_images)
        seconds = work / (self.study.device.peak_flops * self.study.device.utilization * devices) / max(1, len(wanted))
        jobs = []
        for request in wanted:
            key = _key(request, _network(export, request.weights))
            out = self.run_folder(trial.name) / "evals" / export.name / f"{key}.json"
            for shard in range(num_shards):
                name = f"{trial.name}/{export.name}/{key}" + (f" {shard + 1}/{num_shards}" if num_shards > 1 else "")
                place = (shard, num_shards)
                jobs.append(EvalJob(name, trial.name, nimg, export, out, request, place, resources, seconds))
        return jobs


def requests(study: StudyConfig, trial: Trial, nimg: int) -> list[Any]:
    """What is measured at a point of a trial, as `EvalRequest`s."""
    from evaluation.nll.settings import NllSettings
    from evaluation.request import EvalRequest

    wanted = study.evaluation
    folders = {"test": wanted.test, "train": trial.config.data.train}
    threads = None if study.resources.eval_gpus else max(1, int(study.resources.eval_cpus))
    common: dict[str, Any] = {"seed": wanted.seed, "num_threads": threads}
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


def _last_line(path: Path) -> bytes:
    """The last complete line of a file."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 16384))
        lines = file.read().split(b"\n")
    return lines[-2] if len(lines) >= 2 else b""
