"""256 px images in two stages, as in Improved DDPM, and in three, from shards to an image: the presets as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, timeout=280)


TWO_STAGES = [("imagenet64/class_conditional", 64), ("imagenet256/upsampler", 256)]
THREE_STAGES = [("imagenet32/cdm", 32), ("imagenet64/cdm_32_64", 64), ("imagenet256/cdm_64_256", 256)]
NOISE = ["--low-res-noise", 1000, "--low-res-noise", 500, "--augmentation", "truncated"]


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stages", "options"), [(TWO_STAGES, []), (THREE_STAGES, NOISE)], ids=["two", "three"])
def test_train_all_stages_and_sample(tmp_path: Path, stages: list[tuple[str, int]], options: list[object]) -> None:
    """Narrow networks and two steps; every other setting is the preset's: levels, attention, T, 1000 classes."""
    exports = []
    for name, size in stages:
        data, folder = tmp_path / f"data{size}", tmp_path / f"run{size}"
        run("-m", "data_pipeline.prepare", "generated", "--out", data, "--size", size, "--num-classes", 1000,
            "--num-train", 1000, "--num-test", 2)  # fmt: skip
        run("trainer/run.py", "--config", f"configs/runs/{name}.yaml", f"run.folder={folder}",
            f"data.train={data / 'train'}", "model.channels=32", "train.global_batch=2", "train.micro_batch=1",
            "train.budget_images=4", "train.sample_grid.num_images=0", "tracking.mlflow=false",
            "engine.precision=fp32")  # fmt: skip
        exports.append(folder / "exports" / f"{4:012d}")
    out = tmp_path / "samples.npz"
    respacings = [word for number in (4, 3, 2)[: len(stages)] for word in ("--respacing", number)]
    run("-m", "evaluation.sample", *exports, "--num", 2, *respacings, *options, "--out", out)
    with np.load(out) as file:
        assert file["arr_0"].shape == (2, 256, 256, 3)
        assert file["arr_1"].tolist() == [0, 1]
        assert file["arr_0"].std() > 5
