"""A training step of our UNet against the same network in diffusers: `python -m benchmarks.unet_step`.

A step is forward, squared error, backward, AdamW and the EMA update. The networks take turns step by step in one
process, so that whatever else the machine does meets all of them; a matrix product takes its turn too, and says what
the machine can do. Medians over the steps. On the CPU the time is the process's CPU time over its number of threads
(another program on the machine lengthens the wall time, not this); on a GPU it is between CUDA events.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import DiffusersUNet, improved_diffusion_unet
from benchmarks.roofline import step_seconds
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import UNetConfig
from trainer.models import IMAGE_CHANNELS, build_model

CIFAR10: dict[str, Any] = {"image_size": 32, "channel_mult": (1, 2, 2, 2)}
IMAGENET64: dict[str, Any] = {"image_size": 64, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3}
# name: (network, images a step on the CPU, images a step on a GPU)
PRESETS: dict[str, tuple[UNetConfig, int, int]] = {
    "cifar10-small": (UNetConfig(**CIFAR10, channels=32, num_res_blocks=1), 16, 128),
    "cifar10": (UNetConfig(**CIFAR10, channels=64, num_res_blocks=3), 8, 128),
    "imagenet64": (UNetConfig(**IMAGENET64, channels=64), 2, 128),
    "imagenet64-120m": (UNetConfig(**IMAGENET64, channels=128), 1, 64),
}
CPU_PRESETS = ("cifar10-small", "cifar10", "imagenet64")
OUT_CHANNELS = 2 * IMAGE_CHANNELS
EMA_DECAY = 0.9999
WARMUP_STEPS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Clock:
    """Milliseconds that calls took on the device: of the device itself and on the wall."""

    device: torch.device
    milliseconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def time(self, call: Callable[[], object]) -> None:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began = time.perf_counter()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            self.wall.append(1e3 * (time.perf_counter() - began))
            self.milliseconds.append(start.elapsed_time(end))
        else:
            began, cpu = time.perf_counter(), time.process_time()
            call()
            self.milliseconds.append(1e3 * (time.process_time() - cpu) / torch.get_num_threads())
            self.wall.append(1e3 * (time.perf_counter() - began))

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


class Contender:
    """A network with its optimizer and average, ready to step."""

    def __init__(self, name: str, build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.dtype, self.clock = name, dtype, Clock(device)
        torch.manual_seed(0)
        self.network = build()
        with torch.no_grad():  # nothing may be zero: zeros are quick in places
            for parameter in self.network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.network.to(device).train()
        self.parameters: list[Tensor] = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def step(self, x: Tensor, timesteps: Tensor, target: Tensor) -> None:
        """One update: images x [B, 3, H, W], timesteps [B], target [B, 6, H, W]."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.network(x, timesteps)
        F.mse_loss(output.float(), target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - EMA_DECAY)


@dataclass(frozen=True)
class Result:
    """One contender's row. FLOPs are the nominal ones, 2 per multiply-add, 3 x forward, of the plain network."""

    preset: str
    precision: str
    device: str
    num_threads: int
    batch: int
    contender: str
    num_params: int
    step_gflops: float
    median_ms: float  # CPU time a thread, or the GPU's time
    median_wall_ms: float
    gflops_per_second: float
    matmul_gflops_per_second: float  # measured in turn with the steps
    share_of_matmul: float
    speed_of_ours: float  # this contender's time over ours
    roofline_ms: float | None  # of ours, on a GPU


def forward_flops(build: Callable[[], nn.Module], image_size: int) -> float:
    """Forward FLOPs of one image, 2 per multiply-add, counted on the meta device."""
    with torch.device("meta"), torch.no_grad():
        network = build()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, IMAGE_CHANNELS, image_size, image_size), torch.zeros(1))
    return float(counter.get_total_flops())


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    source = torch.empty(1 << 28, device=device)  # 1 GiB
    target, clock = torch.empty_like(source), Clock(device)
    for _ in range(7):
        clock.time(lambda: target.copy_(source))
    return 2 * 4 * source.numel() / (clock.median / 1e3)


def builders(model: UNetConfig, peers: list[str], peer_path: Path | None) -> dict[str, Callable[[], nn.Module]]:
    """How to build each contender, ours first."""
    found: dict[str, Callable[[], nn.Module]] = {"ours": lambda: build_model(model, DiffusionConfig())}
    if "diffusers" in peers:
        found["diffusers"] = lambda: DiffusersUNet(model, out_channels=OUT_CHANNELS)
    if peer_path is not None:
        found["improved-diffusion"] = lambda: improved_diffusion_unet(
            model, out_channels=OUT_CHANNELS, path=peer_path
        )  # fmt: skip
    return found


def race(
    preset: str, precision: str, device: torch.device, steps: int, peers: list[str], peer_path: Path | None
) -> list[Result]:
    """Train all contenders in turns and return their rows."""
    model, cpu_batch, gpu_batch = PRESETS[preset]
    batch, dtype = (gpu_batch if device.type == "cuda" else cpu_batch), DTYPES[precision]
    build = builders(model, peers, peer_path)
    flops = {name: 3 * batch * forward_flops(make, model.image_size) for name, make in build.items()}
    contenders = [Contender(name, make, device, dtype) for name, make in build.items()]

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = Clock(device)
    shape = (batch, IMAGE_CHANNELS, model.image_size, model.image_size)
    x, target = torch.randn(shape, device=device), torch.randn(batch, OUT_CHANNELS, *shape[2:], device=device)
    timesteps = torch.rand(batch, device=device) * 1000
    for number in range(WARMUP_STEPS + steps):
        if number == WARMUP_STEPS:
            for clock in (matmul, *(c.clock for c in contenders)):
                clock.milliseconds.clear()
                clock.wall.clear()
        matmul.time(lambda: a @ b)
        for contender in contenders:
            contender.clock.time(lambda c=contender: c.step(x, timesteps, target))  # type: ignore[misc]

    threads = 1 if device.type == "cuda" else torch.get_num_threads()
    peak = 2 * size**3 / (matmul.median / 1e3)  # FLOP/s
    ours = contenders[0]
    roofline = None
    if device.type == "cuda":
        roofline = 1e3 * step_seconds(
            model, batch, num_params=ours.num_params, peak=peak, bandwidth=memory_bandwidth(device),
            bytes_per_element=torch.finfo(dtype).bits // 8,
        )  # fmt: skip
    rows = []
    for contender in contenders:
        seconds = contender.clock.median / 1e3
        rate = flops[contender.name] / seconds
        rows.append(
            Result(
                preset=preset, precision=precision, device=device.type, num_threads=threads, batch=batch,
                contender=contender.name, num_params=contender.num_params,
                step_gflops=flops[contender.name] / 1e9, median_ms=contender.clock.median,
                median_wall_ms=statistics.median(contender.clock.wall), gflops_per_second=rate / 1e9,
                matmul_gflops_per_second=peak / 1e9, share_of_matmul=rate / peak,
                speed_of_ours=contender.clock.median / ours.clock.median, roofline_ms=roofline,
            )
        )  # fmt: skip
    return rows


HEADER = (
    f"{'preset':16}{'precision':>10}{'batch':>6} {'network':19}{'parameters':>12}{'GFLOP':>9}{'ms':>9}{'wall ms':>9}"
    f"{'GFLOP/s':>9}{'matmul':>9}{'share':>7}{'ours is':>9}"
)


def line(row: Result) -> str:
    """A row of the table under HEADER."""
    faster = "" if row.contender == "ours" else f"{row.speed_of_ours:.2f} x"
    bound = "" if row.roofline_ms is None or row.contender != "ours" else f"  roofline {row.roofline_ms:.1f} ms"
    return (
        f"{row.preset:16}{row.precision:>10}{row.batch:>6} {row.contender:19}{row.num_params:>12,}"
        f"{row.step_gflops:>9.1f}{row.median_ms:>9.1f}{row.median_wall_ms:>9.1f}{row.gflops_per_second:>9.0f}"
        f"{row.matmul_gflops_per_second:>9.0f}{row.share_of_matmul:>7.0%}{faster:>9}{bound}"
    )


def chosen(value: str, known: tuple[str, ...] | list[str], option: str) -> list[str]:
    """The names in a comma-separated option.

    Raises UserError for an unknown one.
    """
    names = [name for name in value.split(",") if name and name != "none"]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name!r} is unknown; choose from {', '.join(known)}.")
    return names


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{name}, torch {torch.__version__}"


def cpu_name() -> str:
    """What the processor calls itself, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--presets", help=f"comma-separated: {', '.join(PRESETS)}; default: those that suit the device")
    parser.add_argument("--precisions", default="fp32,bf16", help="comma-separated: fp32, bf16 (autocast)")
    parser.add_argument("--threads", default="1", help="comma-separated numbers of CPU threads")
    parser.add_argument("--steps", type=int, default=7, help=f"measured steps, after {WARMUP_STEPS} others")
    parser.add_argument("--peers", default="diffusers", help="comma-separated: diffusers; or none")
    parser.add_argument("--peer-path", type=Path, help="a checkout of openai/improved-diffusion, as a further peer")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = ",".join(PRESETS if device.type == "cuda" else CPU_PRESETS)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu.")
    presets = chosen(default if options.presets is None else options.presets, tuple(PRESETS), "--presets")
    precisions = chosen(options.precisions, tuple(DTYPES), "--precisions")
    peers = chosen(options.peers, ["diffusers"], "--peers")
    for option, names, known in (("--presets", presets, PRESETS), ("--precisions", precisions, DTYPES)):
        if not names:
            raise UserError(f"{option} names nothing to measure; choose from {', '.join(known)}.")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} measures nothing; use 1 or more.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for all contenders
    torch.backends.cudnn.benchmark = True

    if not all(number.isdigit() and int(number) > 0 for number in options.threads.split(",")):
        raise UserError(f"--threads {options.threads} must be numbers above 0, such as 1 or 1,2.")

    rows: list[Result] = []
    for threads in (int(number) for number in options.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"\n{machine(device)}, {threads} CPU threads\n{HEADER}")
        for preset in presets:
            for precision in precisions:
                results = race(preset, precision, device, options.steps, peers, options.peer_path)
                print("\n".join(line(row) for row in results), flush=True)
                rows += results
    if options.json is not None:
        write_json(options.json, {"machine": machine(device), "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    run_cli(main)
