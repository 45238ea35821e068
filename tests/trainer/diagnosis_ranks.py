"""Run by the ranks of a test job: a fault on one process, diagnosed under the engine at some ZeRO stages.

python tests/trainer/diagnosis_ranks.py CONFIG.yaml FOLDER STAGE [STAGE ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.conditions import Conditions
from trainer.config.run import load_config
from trainer.diagnosis import Recomputed, diagnose
from trainer.engine import Engine
from trainer.models import build_model
from trainer.processes import Processes, start_processes

FAULTY_LAYER, FAULTY_RANK = 3, 1


def check(overrides: list[str], processes: Processes) -> None:
    config = load_config(Path(sys.argv[1]), [f"run.folder={sys.argv[2]}", *overrides])
    torch.manual_seed(0)
    engine = Engine(build_model(config.model, config.diffusion), config, processes)
    name, layer = [(n, m) for n, m in engine.network.named_modules() if isinstance(m, nn.Conv2d)][FAULTY_LAYER]
    broken = [processes.rank == FAULTY_RANK]

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * torch.nan if broken[0] else output

    layer.register_forward_hook(spoil)
    t = torch.tensor([7, 8])

    def recompute() -> Recomputed:
        losses = engine.forward(torch.randn(2, 3, 16, 16), t.float(), Conditions()).square().flatten(1).mean(dim=1)
        engine.backward(losses.mean())
        first = 100 + 2 * processes.rank
        return Recomputed(t, torch.arange(first, first + 2), losses.detach())

    weights = [(f.name, f.weight) for f in engine.owned]
    text = diagnose(engine.network, recompute, weights, processes)
    expected = f"process 1: layer {name} gave values that are not finite for t = 7, 8 (images 102, 103)"
    assert text == expected, (overrides, text)
    broken[0] = False
    if processes.rank == 0:
        weights[0][1].view(-1)[0] = torch.nan
    text = diagnose(engine.network, recompute, weights, processes)
    assert text.startswith("process 0: the weights themselves are not finite: "), (overrides, text)


if __name__ == "__main__":
    processes = start_processes(num_cpu_threads=1)
    for stage in sys.argv[3:]:
        check([f"engine.zero_stage={stage}"], processes)
    processes.barrier()
    print("checked")
    sys.stdout.flush()
    os._exit(0)
