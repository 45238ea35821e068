"""A classifier of noisy images, trained as any network is: it learns, goes on elsewhere, and needs labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from coloured_data import write_coloured
from ranks import run_ranks

from data_pipeline.errors import ConfigError
from evaluation.evaluate import evaluate
from evaluation.request import EvalRequest
from trainer.config.run import load_config
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.export import open_export
from trainer.inputs import open_dataset
from trainer.plan import plan_text
from trainer.sampling import Stage, sample
from trainer.tracking.records import read_train_records

MODEL = (
    "model={name: classifier, channels: 8, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [], "
    "num_heads: 2, num_classes: 4}"
)
SETTINGS = [
    MODEL, "diffusion.objective=cross_entropy", "train.global_batch=16", "train.lr=0.005", "train.weight_decay=0.05",
    "train.budget_images=512", "train.log_every_images=64", "train.export_images=[]", "name=colours",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two processes: a run at ZeRO-2; one that began at ZeRO-3 and went on at ZeRO-0; a network that it guides."""
    folder = tmp_path_factory.mktemp("classifier")
    write_coloured(folder / "train")
    write_coloured(folder / "test", num=64)
    own = [*SETTINGS, f"data.train={folder / 'train'}"]
    file = folder / "scenarios.json"
    scenarios = [
        [*own, f"run.folder={folder / 'whole'}", "engine.zero_stage=2"],
        [*own, f"run.folder={folder / 'parts'}", "engine.zero_stage=3", "train.budget_images=256"],
        [*own, f"run.folder={folder / 'parts'}", "engine.zero_stage=0", "train.micro_batch=4"],
    ]
    grid = {
        "num_images": 8, "respacing": 10, "guidance": 2.0, "threshold": "dynamic", "threshold_quantile": 0.9,
        "classifier": str(folder / "whole" / "exports" / "000000000512"), "classifier_scale": 5.0,
    }  # fmt: skip
    scenarios += [
        [
            f"data.train={folder / 'train'}", f"run.folder={folder / 'guided'}", "name=guided",
            "model.num_classes=4", "model.null_class=true", "train.class_dropout=0.2", "diffusion.prediction=v",
            f"train.sample_grid={json.dumps(grid)}",
        ]
    ]  # fmt: skip
    file.write_text(json.dumps({"config": str(tiny_config), "runs": scenarios}))
    run_ranks(["tests/trainer/train_scenarios.py", str(file)], 2)
    return folder


def test_it_learns_and_says_how_well(runs: Path) -> None:
    records = list(read_train_records(runs / "whole"))
    assert [r.nimg for r in records] == list(range(64, 513, 64))
    values = records[-1].values
    assert {f"train/{name}_q{q}" for name in ("accuracy", "cross_entropy") for q in range(4)} <= values.keys()
    assert not any(name.startswith(("train/mse", "train/vb", "train/top5")) for name in values)
    assert values["train/loss"] == pytest.approx(values["train/cross_entropy"], rel=1e-6)
    assert values["train/accuracy"] > 0.5  # twice as often as by chance
    assert values["train/accuracy_q0"] > values["train/accuracy_q3"]
    request = EvalRequest(data=runs / "test", metrics=("accuracy",), accuracy_calls=256)
    found = {r.metric: r.value for r in evaluate(runs / "whole" / "exports" / "000000000512", request, progress=False)}
    assert found["accuracy"] > 0.5
    assert found["cross_entropy"] < 1.2  # of ln 4 = 1.39


def test_it_goes_on_in_another_layout(runs: Path) -> None:
    whole, parts = (
        [r.values["train/cross_entropy"] for r in read_train_records(runs / name)] for name in ("whole", "parts")
    )
    assert parts == pytest.approx(whole, rel=1e-3)


def test_it_guides_the_samples_of_another_run(runs: Path) -> None:
    """Beside classifier-free guidance, in the run's own grids; what it asks for is what it then sees."""
    run = runs / "guided"
    assert {p.name for p in (run / "samples").iterdir()} == {"000000000024.png", "000000000048.png"}
    export = open_export(run / "exports" / "000000000048")
    guide = open_export(runs / "whole" / "exports" / "000000000512")
    time = GaussianDiffusion.create(guide.config.diffusion).network_time(torch.zeros(8, dtype=torch.long))
    labels, seen = torch.arange(8) % 4, []
    for scale in (0.0, 5.0, 20.0):
        how = {"classifier_scale": scale, "sampler": "ancestral", "respacing": "50"}
        sampling = export.config.train.sample_grid.model_copy(update=how)
        images = sample(Stage.open(export.network("ema"), export.config, sampling), range(8))
        says = guide.network("ema")(images.float() / 127.5 - 1, time).softmax(dim=1)
        seen.append(float(says.gather(1, labels[:, None]).mean()))
    assert seen[0] + 0.1 < seen[1] < seen[2]


def test_its_labels_must_be_there(tiny_config: Path, tmp_path: Path) -> None:
    data = write_coloured(tmp_path / "some", unlabelled=(3, 77))
    with pytest.raises(ConfigError, match=r"2 of the 128 images .*\(the first is number 3, with label -1"):
        open_dataset(load_config(tiny_config, [*SETTINGS, f"data.train={data}"]))
    with pytest.raises(ConfigError, match=r"model.num_classes=3, but .* has 4 classes; set it to that\."):
        open_dataset(load_config(tiny_config, [*SETTINGS, f"data.train={data}", "model.num_classes=3"]))


def test_a_plan_of_one(tiny_config: Path) -> None:
    text = plan_text(load_config(tiny_config, SETTINGS), 2, mfu=0.3, peak=1e12, limit=None, device="cuda")
    assert "512 images in 32 steps of 16" in text
