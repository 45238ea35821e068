"""What the ladder's networks reach on this machine's devices: `python -m benchmarks.ladder`, or under torchrun.

Each row is the training step itself (`trainer.loop.Run.step`: q_sample, forward, loss, backward, reduction, AdamW,
averages, metrics) under ZeRO 1 in bf16, on generated images of 64 px. A few steps' inputs are made beforehand and take
turns, so that the device and not the host is measured; what making them takes is a column of its own: training makes
them beside the step, so it is held up where that takes longer than the step.

Steps are timed by events on the device and the median counts. MFU is 3 x the forward pass, 2 FLOP per multiply-add,
over `trainer.peak.peak_flops`. Memory is the most that PyTorch had allocated, against what `trainer.memory` foretells.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.unet_step import machine
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.clock import Clock
from trainer.config.model import UNetConfig
from trainer.config.run import RunConfig, load_config
from trainer.inputs import open_dataset
from trainer.loop import Run
from trainer.memory import memory_of
from trainer.micro_batch import with_largest_micro_batch
from trainer.milestones import Milestones
from trainer.models import build_model, count
from trainer.peak import peak_flops
from trainer.processes import Processes, start_processes
from trainer.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
LADDER = ROOT / "configs" / "runs" / "imagenet64" / "ladder"
SIZES = tuple(sorted(int(path.stem[1:]) for path in LADDER.glob("c*.yaml")))
WARM_UP = 5  # steps: cuDNN chooses its kernels, torch.compile compiles, DeepSpeed makes its buffers
POOL = 4  # steps' inputs that take turns
SWITCH = {"off": (False,), "on": (True,), "both": (False, True)}


@dataclass(frozen=True)
class Row:
    """One network in one way of computing; times, rates and bytes."""

    channels: int
    num_params: int
    compiled: bool
    channels_last: bool
    num_processes: int
    micro_batch: int  # of each process
    step_ms: float
    inputs_ms: float  # to make a step's inputs on the host
    images_per_second: float  # of all processes
    mfu: float
    peak_bytes: float | None  # of a GPU
    predicted_bytes: float


def config_of(channels: int, data: Path, folder: Path, *, images: int, **engine: Any) -> RunConfig:
    """The ladder's run of this width; a width that is not on the ladder is its smallest network, scaled."""
    known = channels if channels in SIZES else SIZES[0]
    overrides = [
        f"run.folder={folder}", f"data.train={data / 'train'}", f"model.channels={channels}",
        f"train.global_batch={images}", f"train.log_every_images={images << 20}", f"train.budget_images={images << 20}",
        "train.sample_grid.num_images=0", "tracking.mlflow=false",
        "engine.zero_stage=1", *(f"engine.{key}={str(value).lower()}" for key, value in engine.items()),
    ]  # fmt: skip
    return load_config(LADDER / f"c{known}.yaml", overrides)


def cleaned(device: torch.device) -> float:
    """Free what earlier networks left behind; gives the bytes that are still held."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cpu":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return float(torch.cuda.memory_allocated(device))


def largest_micro_batch(config: RunConfig, processes: Processes) -> int:
    """That fits into every process's memory and divides its share of the batch."""
    cleaned(processes.device)
    build = partial(build_model, config.model, config.diffusion)
    return with_largest_micro_batch(config, processes, build).train.micro_batch or 1


def make_run(config: RunConfig, processes: Processes) -> Run:
    """A fresh run in its folder."""
    dataset, cost = open_dataset(config), count(config.model, config.diffusion)
    folder = RunFolder(config.run.folder)
    processes.from_main(lambda: folder.open(config, {"data_fingerprint": dataset.manifest.fingerprint}))
    return Run(config, folder, Milestones.create(config, cost), cost, dataset, processes)


def measure(config: RunConfig, processes: Processes, *, steps: int) -> Row:
    """Train for a few steps. All processes call it together."""
    device, batch = processes.device, config.train.global_batch
    assert config.engine.peak_flops is not None
    cost, clock = count(config.model, config.diffusion), Clock(device)
    held = cleaned(device)
    assert isinstance(config.model, UNetConfig)
    run = make_run(config, processes)
    began = time.perf_counter()
    pool = [run.inputs.make(number * batch) for number in range(1, 1 + POOL)]
    inputs_ms = 1e3 * (time.perf_counter() - began) / POOL
    moments = []
    for number, inputs in enumerate(islice(cycle(pool), WARM_UP + steps)):
        if number >= WARM_UP:
            moments.append(clock.now())
        run.nimg += batch  # at 0 a step would be measured for the noise scale
        run.step(inputs)
    moments.append(clock.now())
    times = [clock.seconds(a, b) for a, b in pairwise(moments)]
    most = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    micro = run.engine.micro_batch
    run.close()
    seconds = max(processes.gather_objects(statistics.median(times)))
    world = processes.world_size
    return Row(
        channels=config.model.channels, num_params=cost.num_params, compiled=config.engine.compile,
        channels_last=config.engine.channels_last, num_processes=world, micro_batch=micro, step_ms=1e3 * seconds,
        inputs_ms=inputs_ms, images_per_second=batch / seconds,
        mfu=cost.train_flops * batch / world / seconds / config.engine.peak_flops, peak_bytes=most,
        predicted_bytes=memory_of(config, world, device=device.type).total,
    )  # fmt: skip


HEADER = (
    f"{'C':>4}{'parameters':>13}{'compile':>8}{'NHWC':>5}{'micro':>6}{'step ms':>9}{'inputs ms':>10}"
    f"{'img/s':>9}{'MFU':>7}{'GB':>7}{'foretold':>9}"
)


def line(row: Row) -> str:
    """A row of the table under HEADER."""
    used = f"{row.peak_bytes / 1e9:.2f}" if row.peak_bytes is not None else "-"
    return (
        f"{row.channels:>4}{row.num_params:>13,}{'yes' if row.compiled else 'no':>8}"
        f"{'yes' if row.channels_last else 'no':>5}{row.micro_batch:>6}{row.step_ms:>9.1f}"
        f"{row.inputs_ms:>10.1f}{row.images_per_second:>9.1f}{row.mfu:>7.1%}{used:>7}{row.predicted_bytes / 1e9:>9.2f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--channels", default=",".join(map(str, SIZES)), help="widths, such as 64,128")
    parser.add_argument("--micro-batch", type=int, help="images of a process and step; default: all that fit, to 128")
    parser.add_argument("--compile", choices=SWITCH, default="both", help="torch.compile")
    parser.add_argument("--channels-last", choices=SWITCH, default="both", help="activations as [B, H, W, C]")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=30, help=f"that are timed, after {WARM_UP} others")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ladder_DEVICE.json")
    a = parser.parse_args()
    a.widths = [int(c) for c in a.channels.split(",") if c.strip().isdecimal() and int(c) > 0]
    if len(a.widths) != len(a.channels.split(",")):
        raise UserError(f"--channels={a.channels}: give widths above 0, such as 64,128.")
    for option, value in {"--steps": a.steps, "--micro-batch": a.micro_batch}.items():
        if value is not None and value < 1:
            raise UserError(f"{option}={value} measures nothing; use 1 or more.")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here; use --device cpu, with a small --channels.")
    return a


def ladder(a: argparse.Namespace, processes: Processes, folder: Path) -> list[Row]:
    """All rows, printed as they come."""
    device, world = processes.device, processes.world_size
    peak, source = peak_flops(device, a.precision)
    data, rows = folder / "data", []
    command = ["generated", "--out", str(data), "--size", "64", "--num-train", "1024", "--num-test", "8"]
    if processes.is_main:
        subprocess.run([sys.executable, "-m", "data_pipeline.prepare", *command], cwd=ROOT, check=True)
        print(f"\n{machine(device)}, {world} processes; MFU is of {peak / 1e12:.4g} TFLOP/s: {source}\n{HEADER}")
    processes.barrier()
    ways = [(c, k, last) for c in a.widths for k in SWITCH[a.compile] for last in SWITCH[a.channels_last]]
    for number, (channels, compiled, channels_last) in enumerate(ways):
        how = {"compile": compiled, "channels_last": channels_last, "precision": a.precision, "peak_flops": peak}
        make = partial(config_of, channels, data, folder / str(number), **how)
        micro = a.micro_batch or largest_micro_batch(make(images=128 * world), processes)
        rows.append(measure(make(images=micro * world), processes, steps=a.steps))
        if processes.is_main:
            print(line(rows[-1]), flush=True)
    return rows


def main() -> int:
    """The command line; with several processes, each of them."""
    a = arguments()
    if a.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    processes = start_processes(num_cpu_threads=None)
    with tempfile.TemporaryDirectory() as name:  # of the main process; they are on one machine
        rows = ladder(a, processes, Path(processes.from_main(lambda: name)))
        processes.barrier()
    if processes.is_main:
        kind = torch.cuda.get_device_name(processes.device) if a.device == "cuda" else "cpu"
        out = a.out or ROOT / "benchmarks" / "results" / f"ladder_{kind.lower().replace(' ', '_')}.json"
        write_json(out, {"machine": machine(processes.device), "rows": [asdict(row) for row in rows]})
    sys.stdout.flush()
    os._exit(0)  # threads of gloo can hang in the interpreter's teardown


if __name__ == "__main__":
    run_cli(main)
