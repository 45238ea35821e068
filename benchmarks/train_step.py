"""What a step costs beside forward, backward and optimizer, and how two processes compare with one.

    python -m benchmarks.train_step

Jobs of one and of two processes, one core and the same batch each, train a network of 1.7 million parameters with all
that training has: data from shards, averages, metrics, MLflow, asynchronous checkpoints. Within a job, blocks of whole
steps take turns with blocks of bare ones (forward, loss, backward, optimizer on inputs that lie ready). Jobs take
turns, too: one process, two that train together, and two that train apart, which share the machine but nothing else,
so that what communication costs is told apart from what neighbours cost. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import trainer.loop as loop
from benchmarks.unet_step import machine
from data_pipeline.errors import run_cli
from data_pipeline.files import write_json
from data_pipeline.prefetch import Prefetcher
from trainer.communication import Link, step_seconds, traffic
from trainer.config import RunConfig, load_config
from trainer.inputs import StepInputs
from trainer.ports import free_port
from trainer.processes import Processes, StopRequest, start_processes
from trainer.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 16  # steps of a kind before the other kind's turn
BATCH = 16  # images a process and step


class Measured:
    """The inputs of a run's steps, with a stop-watch: the loop asks it for the next ones."""

    def __init__(self, steps: Prefetcher[StepInputs], run: BenchmarkedRun) -> None:
        self._steps, self._run = steps, run

    def __enter__(self) -> Measured:
        self._steps.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._steps.__exit__(*error)

    @property
    def wait_seconds(self) -> float:
        return self._steps.wait_seconds

    def __iter__(self) -> Iterator[StepInputs]:
        run = self._run
        began = time.perf_counter()
        for number, inputs in enumerate(self._steps):
            if number:  # the step before is over, and this one's inputs are here
                run.full.append((run.nimg, time.perf_counter() - began))
            if number % BLOCK == 0:
                run.bare_block(inputs)
            began = time.perf_counter()
            yield inputs


class BenchmarkedRun(loop.Run):
    """A run that notes the time of whole steps and of bare ones in between."""

    def __init__(self, config: RunConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.full: list[tuple[int, float]] = []  # (images seen at its end, seconds)
        self.bare: list[float] = []
        steps = self.inputs.steps
        self.inputs.steps = lambda *range_: Measured(steps(*range_), self)  # type: ignore[method-assign,assignment]

    def bare_block(self, inputs: StepInputs) -> None:
        self.saver.wait()
        self.processes.barrier()
        for _ in range(BLOCK):
            began = time.perf_counter()
            _, weights, losses = self.forward(0, inputs)
            self.engine.backward((losses.loss * weights).mean())
            self.engine.step(0.0)
            self.bare.append(time.perf_counter() - began)
        self.processes.barrier()

    def finish(self) -> None:
        super().finish()
        saves = [self.plan.saves(nimg) for nimg, _ in self.full]
        result = {
            "full": [s for _, s in self.full][BLOCK:], "saves": saves[BLOCK:], "bare": self.bare[BLOCK:],
            "num_params": sum(p.numel() for p in self.engine.network.parameters()),
        }  # fmt: skip
        write_json(self.folder.path / f"times.{self.processes.rank}.json", result)


def child(config: str, core: int, overrides: list[str]) -> None:
    """One process of a job."""
    os.sched_setaffinity(0, {core})
    processes = start_processes(num_cpu_threads=1)
    loop.Run = BenchmarkedRun  # type: ignore[misc,assignment]
    watchdog = Watchdog.start(processes, hang_seconds=0)
    loop.train(load_config(Path(config), overrides), processes, StopRequest(), watchdog)
    if processes.is_main:
        measure_link(processes, load_config(Path(config), overrides).run.folder)
    else:
        measure_link(processes, None)
    watchdog.stop()
    sys.stdout.flush()
    os._exit(0)


def measure_link(processes: Processes, folder: Path | None) -> None:
    """The time of all-reduces of several sizes, for the model of communication."""
    if processes.world_size == 1:
        return
    rows = []
    for elements in (1 << 10, 1 << 16, 1 << 19, 1 << 21, 1 << 22):
        x, seconds = torch.zeros(elements), []
        for _ in range(15):
            processes.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            seconds.append(time.perf_counter() - began)
        rows.append((4 * elements, statistics.median(seconds)))
    if folder is not None:
        write_json(folder / "link.json", rows)


def fit_link(rows: list[tuple[int, float]]) -> Link:
    """(bytes, seconds) of all-reduces of two processes: two rounds, and as many bytes as the message has.

    So t = 2 latency + n / bandwidth. The latency is that of the smallest message, the bandwidth that of the largest.
    """
    (_, small), (size, large) = rows[0], rows[-1]
    return Link(bandwidth=size / (large - small), latency=small / 2)


def start(
    folder: Path, data: Path, name: str, cores: list[int], stage: int, steps: int
) -> list[subprocess.Popen[bytes]]:
    """A job of one process a core."""
    world, port = len(cores), free_port()
    batch = BATCH * world
    overrides = [
        f"run.folder={folder / name}", f"data.train={data / 'train'}", "model.channels=32", "data.num_threads=1",
        f"train.global_batch={batch}", f"train.budget_images={batch * steps}", f"train.log_every_images={batch * 16}",
        f"train.checkpoint_every_images={batch * 48}", f"train.export_images=[{batch * 96}]", "train.warmup_images=0",
        "train.sample_grid.num_images=0", f"engine.zero_stage={stage}", f"tracking.uri=sqlite:///{folder / name}.db",
    ]  # fmt: skip
    jobs = []
    for rank, core in enumerate(cores):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        spec = json.dumps({"config": "configs/runs/cifar10/small.yaml", "core": core, "overrides": overrides})
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.train_step", "--child", spec], cwd=ROOT, env=environment,
                stdout=subprocess.DEVNULL, stderr=open(folder / f"{name}.{rank}.log", "wb"),  # noqa: SIM115
            )
        )  # fmt: skip
    return jobs


def wait(jobs: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for job in jobs:
        if job.wait():
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
            raise SystemExit(f"a process ended with code {job.returncode}:\n{logs}")


def measure(stage: int, rounds: int, steps: int) -> dict[str, Any]:
    """All jobs of one ZeRO stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        command = ["generated", "--out", str(data), "--size", "32", "--num-train", "2048", "--num-test", "16"]
        subprocess.run([sys.executable, "-m", "data_pipeline.prepare", *command], cwd=ROOT, check=True)
        for number in range(rounds):
            wait(start(folder, data, f"one-{number}", [0], stage, steps), folder)
            wait(start(folder, data, f"two-{number}", [0, 1], stage, steps), folder)
            apart = [start(folder, data, f"apart-{core}-{number}", [core], stage, steps) for core in (0, 1)]
            wait(apart[0] + apart[1], folder)
        kinds = {
            kind: [json.loads(p.read_text()) for p in sorted(folder.glob(f"{kind}-*/times.*.json"))]
            for kind in ("one", "two", "apart")
        }
        link = fit_link(json.loads((folder / "two-0" / "link.json").read_text()))
        return summary(kinds, link, stage)


def summary(kinds: dict[str, list[dict[str, Any]]], link: Link, stage: int) -> dict[str, Any]:
    """The figures of the report from the times of all processes."""
    full = {kind: statistics.median(s for run in runs for s in run["full"]) for kind, runs in kinds.items()}
    bare = {kind: statistics.median(s for run in runs for s in run["bare"]) for kind, runs in kinds.items()}
    saving = [
        s / full["two"] for run in kinds["two"] for s, saves in zip(run["full"], run["saves"], strict=True) if saves
    ]
    sent = traffic(num_params=kinds["two"][0]["num_params"], num_processes=2, zero_stage=stage)
    predicted = step_seconds(bare["apart"], sent, link, num_processes=2)
    return {
        "zero_stage": stage,
        "full_step_seconds": full,
        "bare_step_seconds": bare,
        "overhead": {kind: full[kind] / bare[kind] - 1 for kind in kinds},
        "saving_step_in_steps": {"median": statistics.median(saving), "max": max(saving), "count": len(saving)},
        "efficiency": full["one"] / full["two"],
        "efficiency_bare": bare["one"] / bare["two"],
        "efficiency_of_two_apart": full["one"] / full["apart"],
        "link": {"bytes_per_second": link.bandwidth, "latency": link.latency},
        "bytes_sent_per_step": sent.bytes,
        "bare_step_predicted": predicted,
        "predicted_to_measured": predicted / bare["two"],
    }


def report(row: dict[str, Any]) -> str:
    saving, overhead = row["saving_step_in_steps"], row["overhead"]
    return "\n".join(
        [
            f"ZeRO-{row['zero_stage']}, {BATCH} images a process and step, one core each; medians",
            f"  whole step over bare step: one process +{overhead['one']:.1%}, two together +{overhead['two']:.1%}",
            f"  a step with a save: {saving['median']:.2f} of a whole step in the median, {saving['max']:.2f} at most "
            f"({saving['count']} saves)",
            f"  two processes together against one: {row['efficiency']:.1%} a process "
            f"(two apart, which share only the machine: {row['efficiency_of_two_apart']:.1%})",
            f"  link: {row['link']['bytes_per_second'] / 1e9:.2f} GB/s, {row['link']['latency'] * 1e6:.0f} us a round; "
            f"bare step of two predicted / measured: {row['predicted_to_measured']:.3f}",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Overhead of a step, cost of a save, efficiency of two processes.")
    parser.add_argument("--stages", default="1", help="ZeRO stages, such as 0,1,3")
    parser.add_argument("--rounds", type=int, default=3, help="of jobs that take turns")
    parser.add_argument("--steps", type=int, default=160, help="whole steps of a job, and as many bare ones")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(**json.loads(a.child))
    rows = []
    for stage in (int(s) for s in a.stages.split(",")):
        rows.append(measure(stage, a.rounds, a.steps))
        print(report(rows[-1]), flush=True)
    if a.json:
        write_json(a.json, {"machine": machine(torch.device("cpu")), "rows": rows})
    return 0


if __name__ == "__main__":
    run_cli(main)
