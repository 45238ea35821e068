"""What the benchmarks report, from known times; and the ladder's own loop on a small network."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
from benchmarks.ladder import arguments, config_of
from benchmarks.train_step import BARE, FIRST, PREFETCH, WHOLE, Measured, block_seconds, overheads, summary
from data_pipeline.errors import UserError
from trainer.communication import Link
from trainer.models import count

ROOT = Path(__file__).resolve().parents[2]


def a_run(*, step: float = 1.0, log: float = 0.0, save: float = 0.0, waited: float = 0.0) -> dict[str, Any]:
    """Two blocks of steps that take so long, three of which log and one saves; bare steps take 1 s."""
    block = [step] * WHOLE
    for place in (5, 21, 37):
        block[place] += log
    block[20] += save
    return {"whole": [block, block], "waits": [waited] * 2, "bare": [[1.0] * BARE] * 3, "num_params": 1000}


def summed(run: dict[str, Any]) -> dict[str, Any]:
    return summary({"one": [run], "two": [run, run], "apart": [run]}, Link(1e9, 0.0), 1)


def test_what_few_steps_pay_counts() -> None:
    row = summed(a_run(step=1.01, log=0.16, save=0.48, waited=0.48))
    assert row["overhead"]["two"] == pytest.approx(0.01 + 3 * 0.16 / WHOLE + 0.48 / WHOLE + 0.48 / WHOLE)
    assert row["overhead_without_periodic"]["two"] == pytest.approx(0.01)
    assert row["longest_step_in_steps"] == pytest.approx((1.01 + 0.48) / 1.01)
    assert "one process +4.0%, two together +4.0%" in train_step.report(row)


def test_a_block_is_set_against_its_neighbours() -> None:
    """A machine that slows down between two blocks does not look like overhead."""
    run = a_run()
    run["whole"][1] = [3.0] * WHOLE
    run["bare"] = [[1.0] * BARE, [1.0] * BARE, [5.0] * BARE]
    assert block_seconds(run) == [1.0, 3.0]
    assert overheads(run) == pytest.approx([0.0, 0.0])


def test_efficiency_counts_what_is_periodic() -> None:
    kinds = {"one": [a_run()], "two": [a_run(save=WHOLE / 4)], "apart": [a_run()]}
    row = summary(kinds, Link(1e9, 0.0), 1)
    assert row["efficiency"] == pytest.approx(0.8)
    assert row["efficiency_bare"] == 1.0


class Steps:
    """Stands for a run and its prefetcher: an hour passes in a bare block, a second in every step."""

    def __init__(self) -> None:
        self.now, self.whole, self.numbers = 0.0, [], []  # type: ignore[var-annotated]
        self.config = self.data = self
        self.prefetch = PREFETCH

    def bare_block(self, number: int) -> None:
        self.now += 3600.0
        self.whole.append([])
        self.numbers.append(number)


def test_blocks_are_whole_and_leave_out_the_steps_after_a_bare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Steps()
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: run.now)
    total = FIRST + 2 * (PREFETCH + WHOLE) + 1
    measured = Measured(range(total), run)  # type: ignore[arg-type]
    for number in measured:
        after_bare = any(0 <= number - first < PREFETCH for first in run.numbers)  # type: ignore[operator]
        run.now += 0.25 if after_bare else 1.0
    assert run.numbers == [FIRST, FIRST + PREFETCH + WHOLE, FIRST + 2 * (PREFETCH + WHOLE)]
    assert run.whole == [[1.0] * WHOLE, [1.0] * WHOLE, []]


@pytest.mark.prove
def test_the_ladder_trains_and_reports_a_small_network(tmp_path: Path) -> None:
    out = tmp_path / "ladder.json"
    size = ["--device", "cpu", "--channels", "8", "--steps", "2", "--micro-batch", "1", "--precision", "fp32"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.ladder",
        *size,
        "--compile",
        "off",
        "--channels-last",
        "on",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(r["channels"], r["compiled"], r["channels_last"]) for r in rows] == [(8, False, True)]
    config = config_of(8, tmp_path, tmp_path, images=1)
    assert config.model.channel_mult == (1, 2, 3, 4)  # the ladder's shape
    for row in rows:
        assert row["num_params"] == count(config.model, config.diffusion).num_params
        assert row["images_per_second"] == pytest.approx(1e3 / row["step_ms"])
        assert 0 < row["mfu"] < math.inf
        assert row["peak_bytes"] is None
    assert f"{rows[0]['num_params']:,}" in done.stdout


@pytest.mark.parametrize(("option", "value"), [("--channels", "64,x"), ("--steps", "0"), ("--micro-batch", "0")])
def test_the_ladder_refuses_what_measures_nothing(option: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ladder", "--device", "cpu", option, value])
    with pytest.raises(UserError, match=f"{option}={value}"):
        arguments()
