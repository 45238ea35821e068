"""`trainer/run.py` as users start it: plain python, torchrun, deepspeed; mistakes; signals; two jobs at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import ROOT, run_ranks, start_ranks

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import AgreedError, disk_message
from data_pipeline.order import EpochOrder
from trainer.config.run import load_config
from trainer.exits import Exit
from trainer.export import open_export
from trainer.grid import save_grid
from trainer.inputs import downsample
from trainer.ports import free_port
from trainer.run_folder import RunFolder, naming_a_full_disk
from trainer.sampling import Stage, sample
from trainer.tracking.records import read_train_records

BIN = Path(sys.executable).parent


def run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=timeout)


def test_plain_python_trains_and_logs(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    began = time.time()
    done = run(
        sys.executable, "trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}",
        "train.sample_grid.num_images=4", "train.sample_grid.respacing=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = json.loads((folder / "started.json").read_text())
    assert began < started["time"] < (folder / "result.json").stat().st_mtime
    assert started["nimg"] == 8
    records = list(read_train_records(folder))
    assert [r.nimg for r in records] == [16, 24, 32, 48]
    assert {
        "train/loss", "train/grad_norm", "train/mse_q0", "train/vb_q3", "speed/img_per_second",
        "speed/flops_per_second", "speed/data_wait_share",
    } <= {name for record in records for name in record.values}  # fmt: skip
    assert records[-1].compute == pytest.approx(48 * json.loads((folder / "run.json").read_text())["flops_per_image"])
    assert (folder / "samples" / "000000000048.png").exists()
    again = run(sys.executable, "trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}",
                "train.sample_grid.num_images=4", "train.sample_grid.respacing=3")  # fmt: skip
    assert again.returncode == 0
    assert "finished already" in again.stdout
    assert json.loads((folder / "started.json").read_text()) == started  # no step, no new life


def test_a_start_that_cannot_be_noted_goes_on(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "r" / "started.json").mkdir(parents=True)
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'r'}"]
    done = run(sys.executable, *command, "train.budget_images=8", "train.export_images=[]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started.json could not be written (") == 1
    assert "training goes on" in done.stdout


def test_torchrun_and_deepspeed_launchers(tiny_config: Path, tmp_path: Path) -> None:
    launchers = {
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
    }
    for name, launcher in launchers.items():
        folder = tmp_path / name
        done = run(*launcher, "trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}", timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads((folder / "result.json").read_text())
        assert result["nimg"] == 48
        state = json.loads((folder / "checkpoints" / "000000000048" / "state.json").read_text())
        assert state["layout"]["num_processes"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.lrr=1"], "did you mean 'lr'"),
        (["data.train=/nowhere/at/all"], "/nowhere/at/all"),
        (["model.image_size=32"], "16x16"),
        (["model.num_classes=7"], "4 classes"),
        (["--bogus"], "--bogus"),
    ],
)
def test_mistakes_are_one_message(tiny_config: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'r'}"]
    done = run(sys.executable, *command, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_missing_shard_is_refused_at_the_start(tiny_config: Path, generated_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(generated_data, tmp_path / "data")
    next((data / "train").glob("*.tar")).unlink()
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'r'}"]
    done = run(sys.executable, *command, f"data.train={data / 'train'}")
    assert done.returncode == 2
    assert ".tar" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_sample_is_named_whichever_process_meets_it(
    tiny_config: Path, generated_data: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(generated_data / "train", tmp_path / "train")
    shard = next(data.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    for start in range(600, len(content) - 600, 512):  # every sample, so that the second process meets one at once
        content[start] ^= 0xFF
    shard.write_bytes(content)
    config = ["--config", str(tiny_config), f"run.folder={tmp_path / 'r'}", f"data.train={data}"]
    processes = start_ranks(["trainer/run.py", *config], 2)
    try:
        texts = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert 2 in [p.returncode for p in processes]
    assert any("damaged" in text and shard.name in text for text in texts), texts
    assert not any("Traceback" in text for text in texts), texts


def test_a_run_goes_on_past_damaged_samples_that_may_be_replaced(
    tiny_config: Path, generated_data: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(generated_data / "train", tmp_path / "train")
    dataset = ShardDataset(data)
    damaged = np.arange(0, len(dataset), 8)
    for number in damaged:
        shard = data / dataset.manifest.shards[int(dataset.index.shard[number])].file
        content = bytearray(shard.read_bytes())
        content[int(dataset.index.offset[number]) + 60] ^= 0xFF
        shard.write_bytes(content)
    config = load_config(tiny_config)
    sizes = np.array([shard.num_samples for shard in dataset.manifest.shards])
    met = np.isin(EpochOrder(sizes, seed=config.seed).samples(0, config.train.budget_images), damaged)
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'r'}", f"data.train={data}"]
    done = run(sys.executable, *command, "data.on_damage=replace", "data.num_workers=1")
    assert done.returncode == 0, done.stderr
    assert met.any()
    assert done.stderr.count("another sample takes the place of a damaged one") == met.sum()
    replaced = [record.values["data/replaced_images"] for record in read_train_records(tmp_path / "r")]
    assert sum(replaced) == met.sum()


def test_a_taken_port_is_named(tiny_config: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'r'}"]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=os.environ | rank, text=True, capture_output=True, timeout=120
        )
    assert done.returncode == Exit.BUSY
    assert f"port {port} is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_settings_in_the_same_folder_are_refused(tiny_config: Path, tmp_path: Path) -> None:
    command = ["trainer/run.py", "--config", str(tiny_config), f"run.folder={tmp_path / 'r'}"]
    run_ranks([*command, "train.budget_images=8"], 1)
    done = run(sys.executable, *command, "train.lr=0.5")
    assert done.returncode == 2
    assert "train.lr: 0.001 -> 0.5" in done.stderr


def test_a_file_in_the_place_of_the_folder_is_named(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        done = run(sys.executable, "trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}")
        assert done.returncode == 2
        assert f"error: run.folder={folder} cannot be made: " in done.stderr
        assert "Traceback" not in done.stderr


def test_damaged_files_of_a_run_are_named_with_a_remedy(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_result() is None
    for content in (b'{"nimg": 4', b"", b"\xff\x00", b"[]"):
        folder.result.write_bytes(content)
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(AgreedError, match=r"result\.json is damaged .*Remove it: the same command"):
            folder.read_result()
        with pytest.raises(AgreedError, match=r"run\.json is damaged .*Remove it: the run"):
            folder.identity()


def test_a_full_disk_is_told_with_the_runs_folder(tmp_path: Path) -> None:
    for error, named in ((OSError(errno.ENOSPC, "full"), str(tmp_path)), (OSError(errno.ENOSPC, "full", "x"), "x")):
        with pytest.raises(OSError, match="full") as raised, naming_a_full_disk(tmp_path):
            raise error
        assert f"the disk is full while writing {named}." in (disk_message(raised.value) or "")
    with pytest.raises(ConnectionResetError) as other, naming_a_full_disk(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert other.value.filename is None


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_sigterm_saves_and_the_same_command_continues_bit_for_bit(tiny_config: Path, tmp_path: Path) -> None:
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    # Stopping must not wait for the end of a logging interval, which can be many minutes long.
    settings = ["train.export_images=[]", "train.log_every_images=800000"]
    command = ["trainer/run.py", "--config", str(tiny_config), *settings]
    processes = start_ranks([*command, f"run.folder={stopped}", "train.budget_images=1000000"], 2)
    try:
        wait_for(lambda: (stopped / "metrics.0.jsonl").exists())
        second = run(sys.executable, *command, f"run.folder={stopped}")  # a second job on the same folder
        assert second.returncode == Exit.BUSY
        assert "in use" in second.stderr
        processes[1].send_signal(signal.SIGTERM)  # one is told, all stop together
        texts = [p.communicate(timeout=60)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [3, 3], texts
    assert not (stopped / "result.json").exists()
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    end = f"train.budget_images={int(checkpoint.name) + 80}"
    for folder in (stopped, straight):
        run_ranks([*command, f"run.folder={folder}", end], 2)
    notes = [json.loads((folder / "started.json").read_text()) for folder in (stopped, straight)]
    assert [note["nimg"] for note in notes] == [int(checkpoint.name) + 8, 8]  # the newest life's first step
    assert notes[0]["pid"] != processes[0].pid
    files = [next((f / "exports").iterdir()) / "model.safetensors" for f in (stopped, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_dead_launcher_takes_its_ranks_down(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys, os\n"
         "os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')\n"
         "os.environ['MASTER_PORT'] = sys.argv[1]\n"
         "child = subprocess.Popen([sys.executable, *sys.argv[2:]]); print(child.pid, flush=True); child.wait()",
         str(free_port()), "trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}",
         "train.budget_images=1000000", "train.log_every_images=8"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    wait_for(lambda: folder.exists() and len(list(read_train_records(folder))) >= 2)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists(), seconds=40)
    assert list((folder / "checkpoints").glob("0*"))  # it saved before it went


def test_an_upsamplers_grid_enlarges_the_first_images_with_their_own_classes(tiny_config: Path, tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "photos" / ("cat" if number < 6 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    done = run(sys.executable, "-m", "data_pipeline.prepare", "folder", "--from", str(tmp_path / "photos"),
               "--out", str(tmp_path / "data"), "--size", "16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    settings = ["model.low_res_size=8", "model.num_classes=2", "train.budget_images=8", "train.export_images=[]",
                "train.sample_grid={num_images: 4, respacing: 3}"]  # fmt: skip
    data = f"data.train={tmp_path / 'data' / 'train'}"
    run_ranks(["trainer/run.py", "--config", str(tiny_config), f"run.folder={folder}", data, *settings], 1)
    export = open_export(folder / "exports" / "000000000008")
    torch.set_num_threads(1)
    images, labels = ShardDataset(tmp_path / "data" / "train").read(np.arange(4))
    assert labels.tolist() != [0, 1, 0, 1]
    low_res = downsample(torch.from_numpy(images).float() / 127.5 - 1, 8)
    stage = Stage(export.network("ema"), export.config, export.config.train.sample_grid)
    save_grid(sample(stage, range(4), labels=labels.tolist(), low_res=low_res), tmp_path / "expected.png")
    assert (folder / "samples" / "000000000008.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
