"""One process of a job that prints how long the operations of each of its groups may wait, in seconds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config.run import load_config
from trainer.engine import Engine
from trainer.models import build_model
from trainer.processes import StopAgreement, start_processes

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    processes = start_processes(num_cpu_threads=1, hang_seconds=7200)
    engine, agreement = Engine(build_model(config.model, config.diffusion), config, processes), StopAgreement(processes)
    groups = list(dist.distributed_c10d._world.pg_map)
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    print("timeouts", *timeouts, flush=True)
    processes.barrier()  # the first process holds the store that the others still read
    os._exit(0)
