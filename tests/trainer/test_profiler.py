"""The profiler's switch: which steps it traces, what it leaves behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from trainer.processes import Processes
from trainer.profiler import StepProfiler

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def run(profiler: StepProfiler, steps: int) -> None:
    for number in range(steps):
        with record_function(f"step {number}"):
            torch.ones(4) + 1
        profiler.step(8 * (number + 1))


def traced(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {e["name"] for e in events if e.get("name", "").startswith("step ")}


def test_the_steps_after_the_warm_up_are_traced_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = StepProfiler(tmp_path, 2, ALONE)
    run(profiler, 8)
    profiler.close(64)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "40.rank0.json.gz"
    assert traced(path) == {"step 3", "step 4"}
    assert str(path) in capsys.readouterr().out


def test_a_run_that_ends_within_the_trace_keeps_it(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, 100, ALONE)
    run(profiler, 5)
    profiler.close(40)
    (path,) = (tmp_path / "profile").iterdir()
    assert traced(path) == {"step 3", "step 4"}


def test_without_steps_nothing_is_traced_or_written(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, 0, ALONE)
    run(profiler, 8)
    profiler.close(64)
    assert list(tmp_path.iterdir()) == []
