"""What all tests share: a small generated data set, and a quiet, single-threaded torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def generated_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ (256 images) and test/ (64 images), 16x16, 4 classes."""
    folder = tmp_path_factory.mktemp("data") / "generated"
    command = ["generated", "--out", str(folder), "--size", "16", "--num-train", "256", "--num-test", "64"]
    subprocess.run(
        [sys.executable, "-m", "data_pipeline.prepare", *command, "--num-classes", "4"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return folder


TINY_RUN = """
name: tiny
run: {{folder: unset}}
data: {{train: {train}}}
model: {{image_size: 16, channels: 6, channel_mult: [1, 2], num_res_blocks: 1,
  attention_resolutions: [8], num_heads: 2}}
diffusion: {{num_timesteps: 100}}
train: {{global_batch: 8, lr: 1.0e-3, ema_decay: 0.9, grad_clip: 1.0, budget_images: 48, log_every_images: 16,
  export_images: [24], keep_checkpoints: 9}}
engine: {{num_cpu_threads: 1}}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="session")
def tiny_config(generated_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run of six steps of eight images, exported in the middle and at the end."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY_RUN.format(train=generated_data / "train"))
    return path
