"""A study on its stage: a cluster, a disk, a tracker and a driver, for faults to act upon."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_cluster import Nodes, start
from benchmarks.fault_disk import SmallDisk
from benchmarks.fault_marks import command_of, found, kill_all
from benchmarks.fault_tracker import MlflowServer
from benchmarks.fault_watch import StudyWatch
from trainer.ports import free_port

DISK_MEGABYTES = 256

STUDY = """
name: faults
run: run.yaml
ladder: {{key: model.channels, values: {sizes}, label: "C={{value}}"}}
seeds: {seeds}
settings: {{train.checkpoint_every_images: {checkpoint}, train.log_every_images: 64, train.keep_checkpoints: 999}}
budget: {{images: {budget}}}
evaluation:
  test: {data}/test
  images: {points}
  nll: {{splits: {splits}, num_calls: 256}}
  distance: {distance}
resources: {{num_processes: {processes}, num_nodes: {processes}, cpus: {processes}, min_processes: 1,
  shrink_after: 20, eval_share: 0.5}}
device: {{peak_flops: 1.0e+11, utilization: 0.05}}
retry: {{first_pause: 2.0, longest_pause: 10.0}}
tracking: {{mlflow: {mlflow}, uri: {uri}}}
"""
RUN = """
name: small
run: {{folder: unset}}
data: {{train: {data}/train}}
model: {{image_size: 16, channels: 8, channel_mult: [1, 2], num_res_blocks: 1,
  attention_resolutions: [8], num_heads: 2}}
diffusion: {{num_timesteps: 100}}
train: {{global_batch: 8, lr: 1.0e-3, ema_decay: 0.99, grad_clip: 1.0, budget_images: 8}}
"""
GENERATED = ["generated", "--size", "16", "--num-train", "256", "--num-test", "64", "--num-classes", "4"]


@dataclass(frozen=True)
class Scale:
    """How large the study is."""

    sizes: tuple[int, ...] = (8, 12)
    seeds: tuple[int, ...] = (0, 1)
    budget: int = 16384  # images a trial
    processes: int = 1  # of a trial, each on another node; where a node is lost for long one goes on
    checkpoint: int = 1024  # images between checkpoints
    points: int = 4  # of each trial that are evaluated
    splits: tuple[str, ...] = ("test", "train")
    distance: bool = True  # samples are made and measured at each trial's end

    @property
    def num_trials(self) -> int:
        return len(self.sizes) * len(self.seeds)

    def study(self, data: Path, *, tracking: str | None) -> str:
        """The study file; `tracking`: MLflow's address, None for no MLflow."""
        points = [self.budget * (i + 1) // self.points for i in range(self.points)]
        return STUDY.format(
            data=data, sizes=list(self.sizes), seeds=list(self.seeds), budget=self.budget, points=points[:-1],
            processes=self.processes, checkpoint=self.checkpoint, splits=list(self.splits),
            distance="{num_samples: 8, respacing: 2}" if self.distance else "null",
            mlflow=str(tracking is not None).lower(), uri=tracking or "null",
        )  # fmt: skip


def make_data(folder: Path) -> Path:
    """A small generated data set in `folder`/data; made once."""
    data = folder / "data"
    if not (data / "test").exists():
        command = [sys.executable, "-m", "data_pipeline.prepare", *GENERATED, "--out", str(data)]
        subprocess.run(command, check=True, capture_output=True)
    return data


class Driver:
    """`python -m cluster.study run`, again and again if need be."""

    def __init__(self, cluster: Nodes, study: Path, out: Path, log: Path) -> None:
        self.log = log
        self._cluster = cluster
        self._command = [sys.executable, "-m", "cluster.study", "run", str(study), "--out", str(out), "--address"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        extra = {"PYTHONUNBUFFERED": "1"}
        command = [*self._command, self._cluster.address]
        self._process = start(self._cluster, command, where="driver", log=self.log, extra=extra)

    def kill(self) -> int:
        """kill -9 of the driver alone. Returns its process id."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return self._process.pid

    @property
    def code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Stage:
    """All that a fault can reach."""

    cluster: Nodes
    driver: Driver
    watch: StudyWatch
    tracker: MlflowServer | None
    disk: SmallDisk | None
    no_disk: str = ""  # why there is none

    @property
    def token(self) -> str:
        """Marks every process."""
        return self.cluster.token

    def left_over(self) -> list[str]:
        """Commands of the study's processes that live. After the driver's end they are orphans."""
        ours = ("trainer/run.py", "trainer.tracking", "cluster.study", "ray::Trial", "ray::Eval")
        processes = found(self.token, where=lambda command: any(name in command for name in ours))
        return [f"{process.pid} {command_of(process)[:120]}" for process in processes]


@contextlib.contextmanager
def stage(
    folder: Path, make_cluster: Callable[[], Nodes], *, scale: Scale, data: Path, mlflow: bool, small_disk: bool
) -> Iterator[Stage]:
    """Everything in place, the driver not started. At the end nothing of it is left but files."""
    folder.mkdir(parents=True)
    out = folder / "out"
    with ExitStack() as stack:
        disk, why = None, "not wanted"
        if small_disk:
            try:
                disk = SmallDisk(out, megabytes=DISK_MEGABYTES)
                stack.callback(disk.close)
            except OSError as error:
                why = f"no file system can be mounted here: {error}"
        cluster = make_cluster()  # after the disk: hosts see what was mounted before they began
        stack.callback(kill_all, cluster.token)
        stack.callback(cluster.close)
        tracker = None
        if mlflow:
            tracker = MlflowServer(cluster, folder / "mlflow", free_port())
            stack.callback(tracker.kill)
            tracker.start()
        (folder / "run.yaml").write_text(RUN.format(data=data))
        study = folder / "study.yaml"
        study.write_text(scale.study(data, tracking=tracker.uri if tracker else None))
        driver = Driver(cluster, study, out, folder / "driver.log")
        watch = StudyWatch(out, budget=scale.budget, num_trials=scale.num_trials)
        yield Stage(cluster, driver, watch, tracker, disk, why)


def wait_for(condition: Callable[[], object], *, seconds: float) -> bool:
    """Poll until it is true. Returns whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
