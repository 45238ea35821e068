"""What a step costs beside forward, backward and optimizer, and how two processes compare with one.

    python -m benchmarks.train_step

Jobs of one and of two processes, one core and the same batch each, train a network of 1.7 million parameters with all
that training has: data from shards, averages, metrics, MLflow, asynchronous checkpoints and exports. Within a job,
blocks of whole steps take turns with blocks of bare ones (forward, loss, backward, optimizer on inputs that lie ready).
A block of whole steps is counted as a whole: it has three logging intervals and one checkpoint, in every second block
with an export, and what is still being written at its end is waited for and counted. The steps that follow a bare
block at once are left out: their inputs were made meanwhile. Each block is set against the bare ones before and after.

Jobs take turns, too: one process, two that train together, and two that train apart, which share the machine but
nothing else, so that what communication costs is told apart from what neighbours cost. Figures are medians over blocks;
the median of single steps beside them leaves out what few steps pay for all.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import trainer.loop as loop
from benchmarks.unet_step import machine
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from data_pipeline.prefetch import Prefetcher
from trainer.communication import Link, step_seconds, traffic
from trainer.config.run import RunConfig, load_config
from trainer.input_workers import WorkerSteps
from trainer.loop import MicroBatch
from trainer.ports import free_port
from trainer.processes import Processes, StopRequest, start_processes
from trainer.step_inputs import StepInputs
from trainer.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[1]
BARE, WHOLE = 16, 48  # steps of a block
FIRST = 25  # steps before the first block: all is warm, and each block has its checkpoint in its middle
PREFETCH = 2  # steps whose inputs are made ahead
BATCH = 16  # images a process and step


class Measured:
    """The inputs of a run's steps, with a stop-watch: the loop asks it for the next ones."""

    def __init__(self, steps: Prefetcher[StepInputs] | WorkerSteps, run: BenchmarkedRun) -> None:
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
        unmeasured = run.config.data.prefetch  # steps whose inputs were made during a bare block
        began = time.perf_counter()
        for number, inputs in enumerate(self._steps):
            place = (number - FIRST) % (unmeasured + WHOLE)  # of this step; the one before is over
            if number > FIRST and (place == 0 or place > unmeasured):
                run.whole[-1].append(time.perf_counter() - began)
            if number >= FIRST and place == 0:
                run.bare_block(inputs)
            began = time.perf_counter()
            yield inputs


class BenchmarkedRun(loop.Run):
    """A run that notes the time of whole steps and of bare ones in between."""

    def __init__(self, config: RunConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.whole: list[list[float]] = []  # seconds of each step, by block
        self.waits: list[float] = []  # seconds that writing took on after each block
        self.bare: list[list[float]] = []
        steps = self.inputs.steps
        self.inputs.steps = lambda *range_: Measured(steps(*range_), self)  # type: ignore[method-assign,assignment]

    def bare_block(self, inputs: StepInputs) -> None:
        began = time.perf_counter()
        self.saver.wait()
        self.waits.append(time.perf_counter() - began)
        on_device = inputs.to(self.processes.device)
        t, weights = self.timesteps.draw(on_device.u)
        self.processes.barrier()
        seconds = []
        for _ in range(BARE):
            began = time.perf_counter()
            losses = self.losses(MicroBatch(self.nimg, 0, on_device, t, weights))
            self.engine.backward((losses.loss * weights).mean())
            self.engine.step(0.0)
            seconds.append(time.perf_counter() - began)
        self.processes.barrier()
        self.bare.append(seconds)
        self.whole.append([])

    def finish(self, stop: StopRequest) -> None:
        super().finish(stop)
        num_params = sum(p.numel() for p in self.engine.network.parameters())
        result = {
            "whole": self.whole[:-1], "waits": self.waits[1:], "bare": self.bare, "num_params": num_params
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
    folder: Path, data: Path, name: str, cores: list[int], stage: int, blocks: int
) -> list[subprocess.Popen[bytes]]:
    """A job of one process a core."""
    world, port = len(cores), free_port()
    batch = BATCH * world
    steps = FIRST + blocks * (PREFETCH + WHOLE) + 1
    overrides = [
        f"run.folder={folder / name}", f"data.train={data / 'train'}", "model.channels=32", "data.num_threads=1",
        f"data.prefetch={PREFETCH}",
        f"train.global_batch={batch}", f"train.budget_images={batch * steps}", f"train.log_every_images={batch * 16}",
        f"train.checkpoint_every_images={batch * 48}",
        f"train.export_images={list(range(batch * 96, batch * steps, batch * 96))}", "train.warmup_images=0",
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


def measure(stage: int, rounds: int, blocks: int) -> dict[str, Any]:
    """All jobs of one ZeRO stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        command = ["generated", "--out", str(data), "--size", "32", "--num-train", "2048", "--num-test", "16"]
        subprocess.run([sys.executable, "-m", "data_pipeline.prepare", *command], cwd=ROOT, check=True)
        for number in range(rounds):
            wait(start(folder, data, f"one-{number}", [0], stage, blocks), folder)
            wait(start(folder, data, f"two-{number}", [0, 1], stage, blocks), folder)
            apart = [start(folder, data, f"apart-{core}-{number}", [core], stage, blocks) for core in (0, 1)]
            wait(apart[0] + apart[1], folder)
        kinds = {
            kind: [json.loads(p.read_text()) for p in sorted(folder.glob(f"{kind}-*/times.*.json"))]
            for kind in ("one", "two", "apart")
        }
        link = fit_link(json.loads((folder / "two-0" / "link.json").read_text()))
        return summary(kinds, link, stage)


def summary(kinds: dict[str, list[dict[str, Any]]], link: Link, stage: int) -> dict[str, Any]:
    """The figures of the report from the times of all processes."""
    whole = {kind: statistics.median(s for run in runs for s in block_seconds(run)) for kind, runs in kinds.items()}
    bare = {kind: median(run["bare"] for run in runs) for kind, runs in kinds.items()}
    step = {kind: median(run["whole"] for run in runs) for kind, runs in kinds.items()}
    over = {kind: statistics.median(o for run in runs for o in overheads(run)) for kind, runs in kinds.items()}
    sent = traffic(num_params=kinds["two"][0]["num_params"], num_processes=2, zero_stage=stage)
    predicted = step_seconds(bare["apart"], sent, link, num_processes=2)
    return {
        "zero_stage": stage,
        "num_blocks": {kind: sum(len(run["whole"]) for run in runs) for kind, runs in kinds.items()},
        "step_seconds": whole,
        "bare_step_seconds": bare,
        "overhead": over,
        "overhead_without_periodic": {kind: step[kind] / bare[kind] - 1 for kind in kinds},
        "waited_seconds_a_block": {
            kind: statistics.median(w for run in runs for w in run["waits"]) for kind, runs in kinds.items()
        },
        "longest_step_in_steps": max(s for run in kinds["two"] for block in run["whole"] for s in block) / step["two"],
        "efficiency": whole["one"] / whole["two"],
        "efficiency_bare": bare["one"] / bare["two"],
        "efficiency_of_two_apart": whole["one"] / whole["apart"],
        "link": {"bytes_per_second": link.bandwidth, "latency": link.latency},
        "bytes_sent_per_step": sent.bytes,
        "bare_step_predicted": predicted,
        "predicted_to_measured": predicted / bare["two"],
    }


def median(runs: Iterable[list[list[float]]]) -> float:
    """Of all single steps of all blocks."""
    return statistics.median(seconds for blocks in runs for block in blocks for seconds in block)


def block_seconds(run: dict[str, Any]) -> list[float]:
    """Seconds a step of each whole block, with all that happens in it."""
    return [(sum(b) + waited) / len(b) for b, waited in zip(run["whole"], run["waits"], strict=True)]


def overheads(run: dict[str, Any]) -> list[float]:
    """Of each whole block over the bare blocks before and after it."""
    pairs = zip(block_seconds(run), run["bare"], run["bare"][1:], strict=False)
    return [whole / statistics.fmean(before + after) - 1 for whole, before, after in pairs]


def report(row: dict[str, Any]) -> str:
    over, step = row["overhead"], row["overhead_without_periodic"]
    return "\n".join(
        [
            f"ZeRO-{row['zero_stage']}, {BATCH} images a process and step, one core each; medians of "
            f"{row['num_blocks']['two']} blocks of {WHOLE} steps",
            f"  whole steps over bare ones: one process {over['one']:+.1%}, two together {over['two']:+.1%}",
            f"  (single steps, so without logging and saving: {step['one']:+.1%}, {step['two']:+.1%}; the longest step "
            f"took {row['longest_step_in_steps']:.2f} of the median one)",
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
    parser.add_argument("--blocks", type=int, default=3, help=f"of {WHOLE} whole steps in a job")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(**json.loads(a.child))
    if a.rounds < 1 or a.blocks < 1:
        raise UserError(f"--rounds {a.rounds} --blocks {a.blocks} measure nothing; use 1 or more of each.")
    rows = []
    for stage in (int(s) for s in a.stages.split(",")):
        rows.append(measure(stage, a.rounds, a.blocks))
        print(report(rows[-1]), flush=True)
    if a.json:
        write_json(a.json, {"machine": machine(torch.device("cpu")), "rows": rows})
    return 0


if __name__ == "__main__":
    run_cli(main)
