"""An export: the weights, their average and the config. All that evaluation needs, without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.files import fsync_file, sha256_file, write_atomic, write_json
from trainer.checkpoint import MANIFEST, CheckpointReader, checkpoint_name, verify
from trainer.config import RunConfig, load_config
from trainer.models import build_model, count

Weights = Literal["ema", "model"]
FILES: dict[Weights, str] = {"ema": "ema.safetensors", "model": "model.safetensors"}


@dataclass(frozen=True)
class Export:
    """An opened export."""

    path: Path
    config: RunConfig
    info: dict[str, Any]  # export.json: nimg, compute, num_params, flops_per_image, run, seed, data
    weights_sha256: dict[str, str]  # by "ema" and "model"

    def network(self, weights: Weights) -> nn.Module:
        """The network with the averaged or the bare weights, in evaluation mode, on the CPU."""
        network = build_model(self.config.model, self.config.diffusion)
        network.load_state_dict(load_file(self.path / FILES[weights]), strict=True)
        return network.eval().requires_grad_(False)


def write_export(checkpoint: Path, exports: Path, *, run_id: str) -> Path:
    """Turn a checkpoint into `exports/<nimg>`, reading parameter by parameter; an existing one is kept."""
    reader = CheckpointReader(checkpoint)
    final = exports / checkpoint_name(reader.state.nimg)
    if final.exists() and verify(final) is None:
        return final
    temporary = exports / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        config = load_config(checkpoint / "config.yaml")
        save_file(dict(reader.weights("ema")), temporary / FILES["ema"])
        save_file(dict(reader.weights("weight")), temporary / FILES["model"])
        write_atomic(temporary / "config.yaml", (checkpoint / "config.yaml").read_bytes())
        write_json(temporary / "export.json", _info(config, reader, run_id))
        names = [*FILES.values(), "config.yaml", "export.json"]
        for name in names:
            fsync_file(temporary / name)
        entries = {n: {"bytes": (temporary / n).stat().st_size, "sha256": sha256_file(temporary / n)} for n in names}
        write_json(temporary / MANIFEST, {"files": entries})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_file(exports)
    return final


def _info(config: RunConfig, reader: CheckpointReader, run_id: str) -> dict[str, Any]:
    cost = count(config.model, config.diffusion)
    return {
        "nimg": reader.state.nimg,
        "compute": reader.state.compute,
        "num_params": cost.num_params,
        "flops_per_image": cost.train_flops,
        "run": run_id,
        "name": config.name,
        "seed": config.seed,
        "data": reader.state.data_fingerprint,
    }


def open_export(path: Path) -> Export:
    """Check an export's files against its manifest and read its config.

    Raises UserError when it is not one, or is damaged.
    """
    if not (path / "export.json").exists():
        raise UserError(f"{path} is not an export (no export.json); exports are in RUN/exports/<images seen>.")
    problem = verify(path)
    if problem is not None:
        raise UserError(f"the export {path} is damaged: {problem}. Make it again from a checkpoint, or copy it again.")
    files = json.loads((path / MANIFEST).read_text())["files"]
    return Export(
        path=path,
        config=load_config(path / "config.yaml"),
        info=json.loads((path / "export.json").read_text()),
        weights_sha256={kind: files[name]["sha256"] for kind, name in FILES.items()},
    )
