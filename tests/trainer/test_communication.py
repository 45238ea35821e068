"""The model of what processes send: by counting a ring's messages, and by its limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from trainer.communication import Link, main, step_seconds, traffic

ROOT = Path(__file__).resolve().parents[2]
LINK = Link(bandwidth=1e9, latency=1e-5)


def ring_bytes(num_params: int, num_processes: int, rounds_of_all: int) -> float:
    """Bytes a process sends when it hands on one chunk of 1/N in each of N - 1 rounds."""
    chunk = 4 * num_params / num_processes
    return sum(chunk for _ in range(rounds_of_all) for _ in range(num_processes - 1))


@pytest.mark.parametrize("num_processes", [2, 8, 512])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_bytes_are_a_rings(num_processes: int, accumulation: int) -> None:
    passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}
    for stage, rounds in passes.items():
        sent = traffic(num_params=10_000, num_processes=num_processes, zero_stage=stage, accumulation=accumulation)
        assert sent.bytes == pytest.approx(ring_bytes(10_000, num_processes, rounds))


def test_one_process_sends_nothing() -> None:
    sent = traffic(num_params=10**8, num_processes=1, zero_stage=3, accumulation=2)
    assert (sent.bytes, sent.messages) == (0, 0)
    assert step_seconds(0.5, sent, LINK, num_processes=1) == 0.5


def test_what_overlap_hides() -> None:
    sent = traffic(num_params=10**8, num_processes=8, zero_stage=1)
    assert sent.reduced == sent.gathered == pytest.approx(0.35e9)
    latency = 2 * 2 * 7 * 1e-5
    seen = step_seconds(0.3, sent, LINK, num_processes=8)
    assert seen == pytest.approx(0.3 + 0.35 + 0.35 + latency)
    assert step_seconds(0.3, sent, LINK, num_processes=8, overlap=True) == pytest.approx(seen - 0.2)
    assert step_seconds(9.0, sent, LINK, num_processes=8, overlap=True) == pytest.approx(9.35 + latency)


def test_the_command_tells_a_step_for_each_number_and_refuses_what_is_none() -> None:
    command = [sys.executable, "-m", "trainer.communication", "--config", "configs/runs/imagenet64/hybrid.yaml"]
    done = subprocess.run([*command, "--processes", "1,64"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("1", "128"), ("64", "2")]
    assert rows[0][4] == "100.0%"
    assert 0 < float(rows[1][4].rstrip("%")) < 100
    bad = subprocess.run([*command, "--processes", "many"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "--processes=many" in bad.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--processes", "0,8"), ("--processes", "-8"), ("--processes", "8,"), ("--bandwidth", "0"),
        ("--bandwidth", "nan"), ("--latency", "-1"), ("--peak", "0"), ("--mfu", "0"), ("--mfu", "1.5"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(option: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs/runs/imagenet64/hybrid.yaml")
    monkeypatch.setattr("sys.argv", ["communication", "--config", config, f"{option}={value}"])
    with pytest.raises(UserError, match=f"{option}={value}"):
        main()
