"""A job's exit code tells what ended it, on every process, whichever of them met it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import start_ranks

from data_pipeline.errors import AgreedError, ConfigError, DiskFullError
from trainer.config.run import load_config
from trainer.exits import BusyError, DivergedError, Exit, OutOfMemoryError, explained, failure
from trainer.memory import with_micro_batch
from trainer.out_of_memory import naming_the_memorys_remedies
from trainer.processes import Processes


def finish(command: list[str], ranks: int) -> tuple[list[int], list[str]]:
    job = start_ranks(command, ranks)
    try:
        texts = [process.communicate(timeout=120)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    return [process.returncode for process in job], texts


def failing(what: str, rank: int, config: Path, folder: Path, *settings: str) -> tuple[list[int], list[str]]:
    """Two processes, of which `rank` meets the failure."""
    command = ["tests/trainer/failing_run.py", what, str(rank), "--config", str(config), f"run.folder={folder}"]
    return finish([*command, "train.export_images=[]", *settings], 2)


def test_a_run_that_really_diverges(tiny_config: Path, tmp_path: Path) -> None:
    settings = ["train.lr=1e30", "train.max_skipped_steps=2", "train.log_every_images=8", "train.export_images=[]"]
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'run'}", *settings]
    (code,), (text,) = finish(command, 1)
    assert code == Exit.DIVERGED == 5, text
    assert "error: 2 steps in a row" in text
    assert "a lower train.lr" in text
    assert "Traceback" not in text


def test_memory_that_really_runs_out_on_one_process(tiny_config: Path, tmp_path: Path) -> None:
    codes, texts = failing("memory", 1, tiny_config, tmp_path / "run", "train.global_batch=2048",
                           "train.budget_images=4096", "train.log_every_images=2048")  # fmt: skip
    assert codes == [Exit.OUT_OF_MEMORY] * 2 == [6, 6], texts
    assert "error: out of memory on process 1: " in texts[1]
    assert "A micro-batch is 1024 images here: set a smaller train.micro_batch=512" in texts[1]
    assert "failed: out of memory on process 1: " in texts[0]  # by the watchdog, at the machine of the first process
    assert "the same command continues" not in texts[0]
    assert "Traceback" not in texts[1]


@pytest.mark.parametrize(
    ("what", "rank", "code", "said"),
    [
        ("disk", 1, Exit.NO_SPACE, "the disk is full. "),
        pytest.param("storage", 0, Exit.CRASHED, "OSError: [Errno 5] ", marks=pytest.mark.prove),
    ],
)
def test_a_checkpoint_that_one_process_cannot_write(
    tiny_config: Path, tmp_path: Path, what: str, rank: int, code: Exit, said: str
) -> None:
    codes, texts = failing(what, rank, tiny_config, tmp_path / "run", "train.budget_images=8")
    assert codes == [code, code], texts
    told = "error: the checkpoint could not be written, earlier ones are intact: "
    assert f"{told}{said}" in texts[0]
    assert sum(text.count(told) for text in texts) == 1
    assert [i for i, text in enumerate(texts) if "Traceback" in text] == ([rank] if code == Exit.CRASHED else [])


def test_what_an_error_says_and_ends_with() -> None:
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 50)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 50)
    for error in (cuda, of_torch.value, of_numpy.value, MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        message, code = failure(error)
        assert code == Exit.OUT_OF_MEMORY
        assert message.startswith("out of memory: ")
        assert "\n" not in message
    for error, code in (
        (OSError(errno.ENOSPC, "full"), 8), (OSError(errno.EDQUOT, "quota"), 8), (DiskFullError("full"), 8),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 8), (PermissionError(errno.EACCES, "no"), 2),
        (ConfigError("x"), 2), (BusyError("x"), 7), (DivergedError("x"), 5), (AgreedError("x"), 2),
        (AgreedError("x", 8), 8),
    ):  # fmt: skip
        known = explained(error)
        assert known is not None
        assert known.exit_code == code
    for unforeseen in (RuntimeError("shapes differ"), OSError(errno.EIO, "Input/output error"), KeyError("memory")):
        assert explained(unforeseen) is None


def test_an_unforeseen_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        1 // 0  # noqa: B018
    assert failure(raised.value) == ("ZeroDivisionError: integer division or modulo by zero", Exit.CRASHED)
    assert "test_exits.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("micro_batch", "num_processes", "said"),
    [
        (None, 1, "A micro-batch is 8 images here: set a smaller train.micro_batch=4, which"),
        (None, 2, "A micro-batch is 4 images here: set a smaller train.micro_batch=2, which"),
        (2, 1, "A micro-batch is 2 images here: set a smaller train.micro_batch=1, which"),
        (1, 1, "A micro-batch is one image already: try engine.activation_checkpointing=true, "),
    ],
)
def test_the_remedies_for_memory(tiny_config: Path, micro_batch: int | None, num_processes: int, said: str) -> None:
    config = with_micro_batch(load_config(tiny_config, ["run.folder=x"]), micro_batch)
    processes = Processes(0, num_processes, 0, torch.device("cpu"))
    with pytest.raises(OutOfMemoryError) as raised, naming_the_memorys_remedies(config, processes):
        raise MemoryError
    assert str(raised.value).startswith(f"out of memory on process 0: MemoryError. {said}")
    with pytest.raises(RuntimeError, match="boom"), naming_the_memorys_remedies(config, processes):
        raise RuntimeError("boom")
