"""Saving beside training: what is saved is the moment of the save, one at a time, and no failure is lost."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer.saver as module
from data_pipeline.errors import AgreedError
from trainer.checkpoint import CheckpointReader, RunState, Snapshot, list_checkpoints, verify
from trainer.processes import Processes
from trainer.saver import HostCopies, Saver

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def snapshot(nimg: int, fragments: dict[str, Tensor]) -> Snapshot:
    state = RunState(nimg, num_updates=1, compute=1.0, seconds=1.0, data_fingerprint="d", layout={})
    return Snapshot(state, {"w": (4,)}, fragments, {}, "name: x\n")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is set."""
    gate, write = threading.Event(), module.write_checkpoint

    def gated(*arguments: Any) -> Path:
        assert gate.wait(30)
        return write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", gated)
    return gate


def test_training_goes_on_while_its_past_is_written(tmp_path: Path, gate: threading.Event) -> None:
    weights = {"weight|w|0": torch.arange(4.0)}
    saver = Saver(tmp_path, ALONE)
    done: list[Path] = []
    saver.save(snapshot(8, weights), done.append)
    weights["weight|w|0"].fill_(-1)  # the next step
    assert not list_checkpoints(tmp_path)
    assert not done
    gate.set()
    saver.wait()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000000000008"]
    assert done == list_checkpoints(tmp_path)
    assert verify(done[0]) is None
    assert torch.equal(CheckpointReader(done[0]).whole("weight", "w"), torch.arange(4.0))


def test_a_second_save_waits_for_the_first_and_uses_its_memory_again(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, ALONE)
    places, take = [], HostCopies.take

    def noted(self: HostCopies, tensors: dict[str, Tensor]) -> Any:
        taken = take(self, tensors)
        places.append((len(list_checkpoints(tmp_path)), taken[0]["weight|w|0"].data_ptr()))
        return taken

    monkeypatch.setattr(HostCopies, "take", noted)
    saver.save(snapshot(8, {"weight|w|0": torch.zeros(4)}), None)
    second = threading.Thread(target=saver.save, args=(snapshot(16, {"weight|w|0": torch.ones(4)}), None))
    second.start()
    gate.set()
    second.join()
    saver.wait()
    assert [written for written, _ in places] == [0, 1]  # nothing was copied before the first was on the disk
    assert places[0][1] == places[1][1]
    values = [CheckpointReader(p).whole("weight", "w").tolist() for p in reversed(list_checkpoints(tmp_path))]
    assert values == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("where", ["checkpoint", "export"])
def test_a_failure_is_seen_at_once_and_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "checkpoint":
        monkeypatch.setattr("trainer.checkpoint.write_mapping", full)
    saver = Saver(tmp_path, ALONE)
    saver.save(snapshot(8, {"weight|w|0": torch.zeros(4)}), full if where == "export" else None)
    assert saver._thread is not None
    saver._thread.join()
    assert saver.failed
    with pytest.raises(AgreedError, match=rf"the {where} could not be written.*disk is full") as raised:
        saver.wait()
    assert raised.value.exit_code == 8
    assert not saver.failed
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(list_checkpoints(tmp_path)) == (where == "export")


def test_copies_are_of_every_type_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 64)
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64), "empty": torch.zeros(0), "odd": torch.arange(3.0),
        "long": torch.arange(40.0).view(5, 8), "whole": torch.tensor([[1, 2], [3, 4]]), "view": torch.eye(4)[:, 1],
    }  # fmt: skip
    copies, ready = HostCopies().take(tensors)
    assert ready is None
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].dtype == tensor.dtype


def test_closing_lets_a_save_end(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path, ALONE)
    saver.save(snapshot(8, {"weight|w|0": torch.zeros(4)}), None)
    saver.close(0.05)
    assert not list_checkpoints(tmp_path)
    gate.set()
    saver.close()
    assert len(list_checkpoints(tmp_path)) == 1
