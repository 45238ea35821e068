"""Bytes of tensors by kind, per process, against what trainer/memory.py says: `python -m benchmarks.memory`.

Starts 1 and 2 real CPU processes for each ZeRO stage, with the real engine and two averages of the weights, trains
three steps and measures in the last: every storage is counted once, whatever number of tensors look at it. Weights and
gradients are looked at whenever a layer begins and whenever a gradient appears, and the most at once counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unet_step import machine
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.averages.sharded import ShardedEma
from trainer.config.run import RunConfig
from trainer.config.tree import validate
from trainer.engine import Engine
from trainer.memory import memory_of
from trainer.models import build_model, random_inputs
from trainer.ports import free_port
from trainer.processes import start_processes

KINDS = ("weights", "gradients", "masters", "moments", "averages")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One process, one kind."""

    num_processes: int
    zero_stage: int
    accumulation: int  # backward passes a step
    rank: int
    kind: str
    measured: int  # bytes
    theory: float


def config_of(stage: int, num_processes: int, accumulation: int) -> RunConfig:
    """A network of 4.8 million parameters."""
    batch = 2 * num_processes * accumulation
    tree: dict[str, Any] = {
        "name": "memory", "run": {"folder": "none"}, "data": {"train": "none"},
        "model": {"image_size": 16, "channels": 64, "channel_mult": [1, 2, 2], "num_res_blocks": 1},
        "train": {
            "global_batch": batch, "micro_batch": 2, "lr": 1e-4, "extra_ema_decays": [0.999], "budget_images": batch,
        },
        "engine": {"zero_stage": stage, "bucket_elements": 500_000},
    }  # fmt: skip
    return validate(RunConfig, tree, source="benchmarks.memory")


def storage_bytes(tensors: Iterable[Tensor | None], apart: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages under these tensors, each once; without those under the tensors `apart`."""
    counted = {t.untyped_storage()._cdata for t in apart}
    total = 0
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage()._cdata not in counted:
            counted.add(tensor.untyped_storage()._cdata)
            total += tensor.untyped_storage().nbytes()
    return total


class Watch:
    """Measures one process's tensors while it trains."""

    def __init__(self, network: nn.Module, config: RunConfig) -> None:
        self.parameters = list(network.parameters())
        self.weights = self.gradients = 0
        self.engine: Engine | None = None
        for module in network.modules():
            module.register_forward_hook(lambda *_: self.look())
        for parameter in self.parameters:  # before DeepSpeed's own hooks, which move gradients elsewhere
            parameter.register_post_accumulate_grad_hook(lambda _: self.look())
        self.config = config

    def start(self) -> None:
        self.weights = self.gradients = 0

    def look(self) -> None:
        """Take note of the weights and gradients that there are."""
        if self.engine is None:
            return
        self.weights = max(self.weights, storage_bytes(self._weights()))
        self.gradients = max(self.gradients, storage_bytes(self._gradients(), apart=self._buckets()))

    def _weights(self) -> list[Tensor]:
        return [*self.parameters, *(p.ds_tensor for p in self.parameters if hasattr(p, "ds_tensor"))]

    def _gradients(self) -> Iterator[Tensor | None]:
        zero = self._zero()
        yield from (p.grad for p in self.parameters)
        yield getattr(zero, "grad_partitions_flat_buffer", None)
        yield getattr(zero, "grads_in_partition", None)
        for name in ("averaged_gradients", "all_grad_tensors"):
            for tensors in getattr(zero, name, {}).values():
                yield from tensors or ()

    def _buckets(self) -> Iterator[Tensor]:
        for bucket in getattr(self._zero(), "ipg_buckets", {}).values():
            yield from bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]

    def _zero(self) -> Any:
        assert self.engine is not None
        return self.engine._engine.optimizer

    def measured(self, ema: ShardedEma) -> dict[str, int]:
        assert self.engine is not None
        states = list(self.engine.adam.state.values())
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "masters": storage_bytes((f.weight for f in self.engine.owned), apart=self._weights()),
            "moments": storage_bytes(moments),
            "averages": storage_bytes(shadow for shadows in ema.shadows.values() for shadow in shadows),
        }


def be_a_rank(stage: int, accumulation: int) -> list[Row]:
    """Train three steps as one process of the job that the environment describes."""
    processes = start_processes(num_cpu_threads=1)
    config = config_of(stage, processes.world_size, accumulation)
    torch.manual_seed(0)
    network = build_model(config.model, config.diffusion)
    watch = Watch(network, config)
    engine = Engine(network, config, processes)
    ema = ShardedEma(engine.owned, config.train.averages)
    watch.engine = engine
    for step in range(3):  # ZeRO-3 learns in the first what comes again when
        watch.start()
        for _ in range(engine.accumulation):
            inputs = random_inputs(config.model, engine.micro_batch, processes.device)
            engine.backward(engine.forward(*inputs).square().mean())
            watch.look()
            engine.step(1e-4)
        ema.update(step)
    theory = asdict(memory_of(config, processes.world_size, device="cpu"))
    return [
        Row(processes.world_size, stage, accumulation, processes.rank, kind, size, theory[kind])
        for kind, size in watch.measured(ema).items()
    ]


def run_job(stage: int, num_processes: int, accumulation: int) -> list[Row]:
    """The rows of all ranks of a job on this machine. Raises UserError with what a failing one said."""
    port, ranks = free_port(), []
    for rank in range(num_processes):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes), "OMP_NUM_THREADS": "1",
            "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.memory", "--rank", str(stage), str(accumulation)]
        ranks.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )  # fmt: skip
    rows = []
    for process in ranks:
        output, errors = process.communicate(timeout=300)
        if process.returncode:
            raise UserError(f"a process at ZeRO stage {stage} failed:\n{errors[-3000:]}")
        rows += [Row(**row) for row in json.loads(output.splitlines()[-1])]
    return rows


def table(rows: list[Row]) -> str:
    """MB and the ratio to theory; of the process with the larger ratio where there are several."""
    lines = [f"{'processes':>9} {'ZeRO':>4} {'backwards':>9}" + "".join(f"{kind:>18}" for kind in KINDS)]
    jobs = sorted({(r.num_processes, r.zero_stage, r.accumulation) for r in rows})
    for job in jobs:
        cells = []
        for kind in KINDS:
            of_kind = [r for r in rows if (r.num_processes, r.zero_stage, r.accumulation) == job and r.kind == kind]
            worst = max(of_kind, key=lambda r: r.measured)
            ratio = f"{worst.measured / worst.theory:.3f}" if worst.theory else "-"
            cells.append(f"{worst.measured / 1e6:>10.2f} x {ratio:>5}")
        lines.append(f"{job[0]:>9} {job[1]:>4} {job[2]:>9}" + "".join(cells))
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stages", default="0,1,2,3", help="comma-separated ZeRO stages")
    parser.add_argument("--processes", default="1,2", help="comma-separated numbers of processes")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--rank", nargs=2, type=int, help=argparse.SUPPRESS)  # what this script starts itself as
    options = parser.parse_args()
    if options.rank:
        rows = be_a_rank(*options.rank)
        sys.stdout.write("\n" + json.dumps([asdict(row) for row in rows]) + "\n")
        sys.stdout.flush()
        os._exit(0)  # threads of gloo can hang in the interpreter's teardown
    rows = []
    for name, value in (("--stages", options.stages), ("--processes", options.processes)):
        if not all(number.isdigit() for number in value.split(",")):
            raise UserError(f"{name} {value} must be numbers, such as 1,2.")
    for num_processes in map(int, options.processes.split(",")):
        for stage in map(int, options.stages.split(",")):
            for accumulation in (1, 2):
                rows += run_job(stage, num_processes, accumulation)
    print(f"{machine(torch.device('cpu'))}\nMB of a process x measured / theory\n{table(rows)}")
    if options.json is not None:
        found = {"machine": machine(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        write_json(options.json, found)
    return 0


if __name__ == "__main__":
    run_cli(main)
