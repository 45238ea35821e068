"""A study's folder as training and evaluation leave it, made up in a second: nothing is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from cluster.definition.spec import load_study
from cluster.definition.trials import Trial, make_trials
from cluster.files.folder import StudyFolder
from trainer.tracking.records import EvalRecord, RecordWriter, TrainRecord, read_eval_records

SIZES, SEEDS, NUM_POINTS = (4, 8, 12, 16), (0, 1, 2), 8
_START = 1.7e9  # Unix seconds
_RUN = """
name: made
run: {folder: unset}
data: {train: data/made/train}
model: {image_size: 16, channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [8], num_heads: 2}
diffusion: {num_timesteps: 100}
train: {global_batch: 8, lr: 1.0e-3, budget_images: 48, log_every_images: 16, export_images: [24]}
"""
_STUDY = {
    "name": "made", "run": "run.yaml", "seeds": list(SEEDS), "budget": {"flops": 1.0e13},
    "ladder": {"key": "model.channels", "values": list(SIZES), "label": "C={value}"},
    "evaluation": {
        "test": "data/made/test", "num_points": NUM_POINTS, "min_images": 2000, "nll": {"splits": ["test", "train"]},
        "distance": {"num_samples": 512, "respacing": "25", "points": "all"},
    },
}  # fmt: skip


class MadeStudy(StudyFolder):
    """A study whose records are taken as they are: their exports do not exist."""

    def current_records(self, trial: str) -> list[EvalRecord]:
        return read_eval_records(self.run_folder(trial))


def make_study(folder: Path, *, uri: str) -> MadeStudy:
    """Write the study into `folder`/made; its tracker is at `uri`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(_RUN)
    (folder / "study.yaml").write_text(yaml.safe_dump(_STUDY | {"tracking": {"uri": uri}}))
    study = load_study(folder / "study.yaml", [])
    made = MadeStudy(folder / "made", study, make_trials(study))
    made.prepare()
    for number, trial in enumerate(made.trials.values()):
        _write_run(made.run_folder(trial.name), trial, np.random.default_rng(number))
    return made


def _write_run(folder: Path, trial: Trial, rng: np.random.Generator) -> None:
    config = trial.config
    about = {
        "id": f"made-{trial.name}", "name": config.name, "seed": trial.seed, "tags": config.tracking.tags,
        "num_params": trial.cost.num_params, "flops_per_image": trial.cost.train_flops, "data_fingerprint": "a" * 64,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text((folder / "trial.yaml").read_text())
    writer = RecordWriter(folder, 0)
    for nimg in np.unique(np.linspace(16, trial.total_images, 60).astype(int)).tolist():
        writer.write(_train_record(trial, nimg, rng))
    writer.close()
    level = math.exp(rng.normal(0, 0.004))  # of this run
    (folder / "samples").mkdir()
    for nimg in trial.export_images:
        _write_evaluations(folder / "evals" / f"{nimg:012d}", trial, nimg, level, rng)
        grid = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(grid).save(folder / "samples" / f"{nimg:012d}.png")
    (folder / "result.json").write_text(json.dumps({"nimg": trial.total_images}))


def _train_record(trial: Trial, nimg: int, rng: np.random.Generator) -> TrainRecord:
    loss = 0.05 + 2.0 * nimg**-0.4 * math.exp(rng.normal(0, 0.1))
    values = {
        "train/loss": loss,
        "train/mse": loss,
        "train/vb": 1 + loss,
        "train/grad_norm": 3 * loss,
        "train/lr": 1e-3,
    }
    values |= {f"train/{kind}_q{q}": loss / (q + 1) for kind in ("mse", "vb") for q in range(4)}
    values |= {"speed/img_per_second": 400.0 + rng.normal(0, 5), "speed/mfu": 0.3, "speed/data_wait_share": 0.01}
    values |= {"system/cpu_utilization_percentage": 90.0, "train/skipped_steps": 0.0}
    return TrainRecord(nimg, nimg * trial.cost.train_flops, _START + nimg, values)


def _write_evaluations(folder: Path, trial: Trial, nimg: int, level: float, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    size = trial.cost.num_params / 1e5
    nll = level * (2.8 + 0.8 * size**-0.3 + 2.5 * (nimg / 1000) ** -0.6)
    usual = {"bound": "L_vlb", "mode": "importance", "num_timesteps": 100, "trained_timesteps": 100, "respacing": None,
             "clip_denoised": True, "weights": "ema"}  # fmt: skip
    samples = {"sampler": "ddim", "respacing": "25", "feature_net": "efflite0", "num_reference": 2048, "weights": "ema"}
    kinds = [
        ("nll", "test", nll + rng.normal(0, 0.01), 0.01, 2048, usual),
        ("nll", "train", nll - 0.02 + rng.normal(0, 0.01), 0.01, 2048, usual),
        ("fd_efflite0", "test", 60 * (nll - 2.4) * math.exp(rng.normal(0, 0.01)), None, 512, samples),
    ]
    for number, (metric, split, value, stderr, n, measured) in enumerate(kinds):
        record = EvalRecord(
            metric, split, value, stderr, n, [0], measured, data=f"made-{split}", weights="w", run=trial.name,
            nimg=nimg, compute=nimg * trial.cost.train_flops, num_params=trial.cost.num_params,
            flops_per_image=trial.cost.train_flops, seed=trial.seed, time=_START + nimg,
        )  # fmt: skip
        content = {"key": f"k{number}", "records": [record.to_json()], "spec": {"data": f"data/made/{split}"}}
        (folder / f"k{number}.json").write_text(json.dumps(content))
