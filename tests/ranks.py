"""Starts the ranks of a small distributed job for tests, and waits for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from trainer.ports import free_port

ROOT = Path(__file__).resolve().parents[1]


def start_ranks(command: list[str], world_size: int) -> list[subprocess.Popen[str]]:
    """`python COMMAND` as each rank of a job on this machine."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return processes


def run_ranks(command: list[str], world_size: int, timeout: float = 240) -> str:
    """Run the ranks to their end; returns what they printed. Fails with that text if any of them failed."""
    processes = start_ranks(command, world_size)
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    text = "\n".join(
        f"--- rank {i} (exit {p.returncode})\n{o}" for i, (p, o) in enumerate(zip(processes, outputs, strict=True))
    )
    assert all(p.returncode == 0 for p in processes), text
    return text
