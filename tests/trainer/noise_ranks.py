"""Run by the ranks of a test job: what the noise scale hears under the engine, against plain torch.

    python tests/trainer/noise_ranks.py CONFIG.yaml FOLDER CASE [CASE ...]

Every process computes its micro-batches' gradients once more on a copy of the network without DeepSpeed.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch

from trainer.conditions import Conditions
from trainer.config.run import load_config
from trainer.engine import Engine
from trainer.models import build_model
from trainer.noise_scale import NoiseScale
from trainer.processes import Processes, start_processes

CASES = [
    ["engine.zero_stage=0"],
    ["engine.zero_stage=1"],
    ["engine.zero_stage=2"],
    ["engine.zero_stage=3"],
    ["engine.zero_stage=3", "engine.activation_checkpointing=true"],
    ["engine.zero_stage=2", "engine.precision=bf16"],
    ["engine.zero_stage=1", "engine.precision=fp16"],
]


def check(overrides: list[str], processes: Processes) -> None:
    config = load_config(Path(sys.argv[1]), [f"run.folder={sys.argv[2]}", "train.micro_batch=2", *overrides])
    torch.manual_seed(0)
    network = build_model(config.model, config.diffusion, checkpoint_activations=config.engine.activation_checkpointing)
    with torch.no_grad():
        for parameter in network.parameters():  # nothing is zero, so every parameter has a gradient
            parameter.add_(0.05 * torch.randn_like(parameter))
    alone = copy.deepcopy(network)
    engine = Engine(network, config, processes)
    noise = NoiseScale(
        engine.network.parameters(), micro_batch=engine.micro_batch, global_batch=config.train.global_batch,
        accumulation=engine.accumulation,
    )  # fmt: skip
    assert engine.accumulation > 1
    generator = torch.Generator().manual_seed(processes.rank)
    for step in range(3):
        squares = []
        with noise.watch(step != 1, engine.loss_scale.value if engine.loss_scale else None):
            for _ in range(engine.accumulation):
                x = torch.randn(2, 3, 16, 16, generator=generator)
                t = torch.randint(100, (2,), generator=generator).float()
                engine.backward(engine.forward(x, t, Conditions()).square().mean())
                engine.step(0.0)  # nothing moves: the copy stays a copy
                alone.zero_grad()
                alone(x, t).square().mean().backward()
                squares.append(sum(float(p.grad.double().square().sum()) for p in alone.parameters()))
        measured, expected = noise.small_square(), sum(squares) / len(squares)
        if step == 1:
            assert measured is None
            continue
        relative = 1e-5 if config.engine.precision == "fp32" else 0.01  # half precision's own rounding
        assert abs(float(measured) - expected) <= relative * expected, (overrides, step, float(measured), expected)


if __name__ == "__main__":
    processes = start_processes(num_cpu_threads=1)
    for case in sys.argv[3:]:
        check(CASES[int(case)], processes)
    processes.barrier()
    print("checked", *sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)
