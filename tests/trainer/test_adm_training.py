"""ADM's UNet and classifier under DeepSpeed: ZeRO-3, with all that changes the layout, trains what ZeRO-0 does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

# Wide enough that no normalisation group has a single channel (tests/trainer/test_layouts.py).
NETWORK = ["model.channels=40", "model.num_head_channels=8", "model.attention_order=qkv_first",
           "model.resblock_updown=true", "train.budget_images=24", "train.log_every_images=8",
           "train.export_images=[]"]  # fmt: skip
CLASSIFIER = [*NETWORK, "model.name=classifier", "model.channel_mult=[1,2]", "model.num_res_blocks=1",
              "model.attention_resolutions=[8]", "model.num_classes=4", "diffusion.objective=cross_entropy",
              "train.lr_decay=linear"]  # fmt: skip
KINDS = {"unet": [*NETWORK, "model.rescale_residuals=true", "model.num_classes=4"], "classifier": CLASSIFIER}


@pytest.fixture(scope="module")
def runs(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders <kind>-zero and <kind>-three, by the stage of ZeRO; two processes each."""
    base = tmp_path_factory.mktemp("adm")
    stages = {
        "zero": ["engine.zero_stage=0"],
        "three": ["engine.zero_stage=3", "train.micro_batch=2", "engine.activation_checkpointing=true"],
    }
    spec = base / "spec.json"
    scenarios = [
        [f"run.folder={base / f'{kind}-{stage}'}", *words, *more]
        for kind, words in KINDS.items()
        for stage, more in stages.items()
    ]
    spec.write_text(json.dumps({"config": str(tiny_config), "runs": scenarios}))
    run_ranks(["tests/trainer/train_scenarios.py", str(spec)], 2)
    return base


def values(run: Path, name: str) -> list[float]:
    lines = (run / "metrics.0.jsonl").read_text().splitlines()
    return [json.loads(line)["values"][name] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_trains_the_same(runs: Path, kind: str) -> None:
    zero, three = runs / f"{kind}-zero", runs / f"{kind}-three"
    losses = values(zero, "train/loss")
    assert len(losses) == 3
    assert values(three, "train/loss") == pytest.approx(losses, rel=1e-5)
    ours, theirs = (load_file(run / "exports" / f"{24:012d}" / "model.safetensors") for run in (zero, three))
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(ours)]) for tensors in (ours, theirs)]
    assert (flat[0] - flat[1]).norm() < 1e-5 * flat[0].norm()


def test_the_classifiers_rate_falls_to_the_end_of_its_budget(runs: Path) -> None:
    assert values(runs / "classifier-zero", "train/lr") == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert values(runs / "unet-zero", "train/lr") == pytest.approx([1e-3] * 3)
