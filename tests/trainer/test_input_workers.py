"""Worker processes: what goes wrong in them reaches the user, and they never outlive their run."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import psutil
import pytest
import torch

from data_pipeline.errors import DataError, UserError
from trainer.damage import DamageWatch
from trainer.input_workers import WorkerSteps
from trainer.step_inputs import StepInputs


class Numbers:
    """Inputs that tell their image number and who made them; refuses some."""

    def __init__(self, refused: int = -1) -> None:
        self._refused = refused

    def make(self, nimg: int) -> StepInputs:
        if nimg == self._refused:
            raise DataError("shard x: sample 7 is damaged.")
        told = torch.tensor([nimg, os.getpid()])
        return StepInputs(told, told, told, told, {nimg: "damaged"} if nimg % 2 else {})


def test_workers_serve_errors_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """One pool for all of it: starting one takes seconds."""
    with WorkerSteps(partial(Numbers, 7), range(20), num_workers=2, prefetch=4, pin=False) as steps:
        made = [next(steps) for _ in range(7)]
        assert [int(inputs.images[0]) for inputs in made] == list(range(7))
        workers = {int(inputs.images[1]) for inputs in made}
        assert len(workers) == 2
        assert os.getpid() not in workers
        assert made[3].damaged == {3: "damaged"}
        assert steps.wait_seconds > 0
        with pytest.raises(DataError, match=r"^shard x: sample 7 is damaged\.$"):
            next(steps)
        assert int(next(steps).images[0]) == 8
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT):  # as a launcher sends them to the whole group
                os.kill(worker, number)
        assert int(next(steps).images[0]) == 9
        os.kill(min(workers), signal.SIGKILL)
        time.sleep(0.3)  # in a step or a save: nothing is raised there
        with pytest.raises(UserError, match=r"a data worker died: .*data.num_workers=2"):
            list(steps)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Traceback" not in capfd.readouterr().err


def test_damage_is_named_once_and_too_much_of_it_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    watch = DamageWatch(max_damaged=2)
    watch.look({})
    watch.look({7: "sample g is damaged."})
    watch.look({7: "sample g is damaged.", 9: "sample i is damaged."})
    assert capsys.readouterr().err.count("another sample takes the place of a damaged one. sample g is damaged.") == 1
    with pytest.raises(DataError, match=r"^sample k .* number 3 of this process, and data\.max_damaged=2"):
        watch.look({11: "sample k is damaged."})
