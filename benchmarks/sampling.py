"""What sampling costs beside the network: `python -m benchmarks.sampling`.

A job as `python -m evaluation.sample` runs it (noise, the sampler's arithmetic, chunks written and read back, the npz
and its grid) takes turns with the bare network, called as often on batches of the same size, in one process. The time
is CPU time over the number of threads (threads that draw noise count too); on a GPU the wall time. `share` is the bare
network's time over the job's, the median over the rounds.

With --memory, the peak memory of two jobs that differ only in how many images they make.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.unet_step import machine
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from evaluation.chunks import Chunks
from evaluation.device import pick_device
from evaluation.sample_files import Images, write_npz
from evaluation.sampling_job import sample_chunks
from trainer.config.model import ModelConfig
from trainer.config.run import RunConfig
from trainer.config.sampling import SamplingConfig
from trainer.config.tree import validate
from trainer.export import open_export
from trainer.grid import save_grid
from trainer.models import IMAGE_CHANNELS, build_model
from trainer.sampling import Stage

CIFAR10: dict[str, Any] = {"image_size": 32, "channel_mult": (1, 2, 2, 2)}
IMAGENET64: dict[str, Any] = {"image_size": 64, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3}
# name: (network, images a batch, steps) on the CPU; four times the images on a GPU
PRESETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cifar10-c16": ({**CIFAR10, "channels": 16, "num_res_blocks": 1}, 32, 20),
    "cifar10": ({**CIFAR10, "channels": 64, "num_res_blocks": 3}, 16, 4),
    "imagenet64-120m": ({**IMAGENET64, "channels": 128}, 4, 3),
}
GPU_FACTOR = 4
CHUNKS = 2  # batches of a job
MEMORY_IMAGES = (1024, 16384)
MEGABYTE = 1e6


@dataclass(frozen=True)
class Row:
    """One network under one sampler."""

    network: str
    sampler: str
    num_params: int
    batch: int
    num_steps: int
    network_ms: float  # bare, a call of one batch
    job_ms: float  # the job's time a call
    share: float  # of the job's time that the bare network takes


def random_network(model: ModelConfig, config: RunConfig) -> nn.Module:
    """A network without a zero in it: zeros are quick in places."""
    torch.manual_seed(0)
    network = build_model(model, config.diffusion).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def config_of(model: dict[str, Any]) -> RunConfig:
    """A run of which only the network and the process matter here."""
    tree = {
        "name": "benchmark", "run": {"folder": "unused"}, "data": {"train": "unused"}, "model": model,
        "train": {"global_batch": 1, "lr": 1e-4, "budget_images": 1},
    }  # fmt: skip
    return validate(RunConfig, tree, source="benchmark")


def run_job(stage: Stage, num: int, batch: int, device: torch.device, folder: Path) -> None:
    """All that a sampling job does, files included."""
    work = folder / "chunks"
    chunks = Chunks(work)
    parts = sample_chunks([stage], range(num), batch=batch, device=device, chunks=chunks)
    first: list[Images] = []

    def images() -> Iterator[Images]:
        for part in parts:
            if not first:
                first.append(part["images"])
            yield part["images"]

    size = stage.config.model.image_size
    write_npz(folder / "a.npz", images(), num=num, image_size=size, labels=None, scratch=work)
    save_grid(torch.from_numpy(first[0]).permute(0, 3, 1, 2), folder / "a.png")
    chunks.remove()


@torch.no_grad()
def run_bare(stage: Stage, num: int, batch: int, device: torch.device) -> None:
    """The network calls of such a job and nothing else."""
    size = stage.config.model.image_size
    x = torch.randn(batch, IMAGE_CHANNELS, size, size, device=device)
    times = torch.linspace(0, 999, batch, device=device)
    for _ in range(stage.num_calls * num // batch):
        stage.network(x, times)


def seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter() if device.type == "cuda" else time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - began
    return (time.process_time() - began) / torch.get_num_threads()


def race(name: str, stage: Stage, batch: int, device: torch.device, rounds: int) -> Row:
    """Jobs and bare calls in turns; each job is set against the calls before and after it."""
    num, calls = CHUNKS * batch, CHUNKS * stage.num_calls
    jobs, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        run_bare(stage, num, batch, device)
        for _ in range(rounds):
            bare.append(seconds(lambda: run_bare(stage, num, batch, device), device))
            jobs.append(seconds(lambda: run_job(stage, num, batch, device, Path(folder)), device))
        bare.append(seconds(lambda: run_bare(stage, num, batch, device), device))
    shares = [(before + after) / 2 / job for before, job, after in zip(bare, jobs, bare[1:], strict=False)]
    return Row(
        network=name, sampler=stage.sampling.sampler,
        num_params=sum(p.numel() for p in stage.network.parameters()), batch=batch, num_steps=stage.num_calls,
        network_ms=1e3 * statistics.median(bare) / calls, job_ms=1e3 * statistics.median(jobs) / calls,
        share=statistics.median(shares),
    )  # fmt: skip


def _peak(num: int, queue: Any) -> None:
    """The peak resident memory of a job of `num` images in a process of its own."""
    torch.set_num_threads(1)
    model = {**CIFAR10, "channels": 4, "channel_mult": (1, 1, 1, 1), "num_res_blocks": 1, "attention_resolutions": ()}
    config = config_of(model)
    stage = Stage(random_network(config.model, config), config, SamplingConfig(respacing="2"))
    with tempfile.TemporaryDirectory() as folder:
        run_job(stage, num, 64, torch.device("cpu"), Path(folder))
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak_memory(num: int) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(num, queue))
    process.start()
    process.join()
    return int(queue.get())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", default="cifar10-c16,cifar10", help=f"comma-separated: {', '.join(PRESETS)}")
    parser.add_argument("--export", type=Path, help="a trained network instead, with the first network's batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a short and of a long job")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    a = parser.parse_args()
    names = a.networks.split(",")
    for name in names:
        if name not in PRESETS:
            raise UserError(f"--networks {name!r} is unknown; choose from {', '.join(PRESETS)}.")
    if a.rounds < 1:
        raise UserError(f"--rounds {a.rounds} measures nothing; use 1 or more.")
    device = pick_device(a.num_threads)
    print(f"{machine(device)}, {a.num_threads} CPU threads")
    print(f"{'network':18}{'sampler':>10}{'batch':>7}{'steps':>7}{'network ms':>12}{'job ms':>9}{'share':>8}")
    rows = []
    for name in names if a.export is None else names[:1]:
        model, batch, steps = PRESETS[name]
        batch *= GPU_FACTOR if device.type == "cuda" else 1
        if a.export is None:
            config = config_of(model)
            network = random_network(config.model, config).to(device)
        else:
            export = open_export(a.export)
            config, network, name = export.config, export.network("ema").to(device), export.info["name"]
        for sampler in ("ancestral", "ddim"):
            sampling = validate(SamplingConfig, {"sampler": sampler, "respacing": steps}, source="benchmark")
            rows.append(race(name, Stage(network, config, sampling), batch, device, a.rounds))
            r = rows[-1]
            print(
                f"{r.network:18}{r.sampler:>10}{r.batch:>7}{r.num_steps:>7}{r.network_ms:>12.1f}{r.job_ms:>9.1f}"
                f"{r.share:>8.1%}",
                flush=True,
            )
    peaks = {num: peak_memory(num) / MEGABYTE for num in MEMORY_IMAGES} if a.memory else {}
    for num, peak in peaks.items():
        print(f"{num:,} images of 32 px: peak memory {peak:,.0f} MB")
    if a.json is not None:
        result = {"machine": machine(device), "num_threads": a.num_threads, "rows": [asdict(row) for row in rows]}
        write_json(a.json, result | {"peak_megabytes": peaks})
    return 0


if __name__ == "__main__":
    run_cli(main)
