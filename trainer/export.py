"""An export: the weights, their average and the config. All that evaluation needs, without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    info: dict[str, Any]  # export.json: nimg, compute, num_params, flops_per_image, run, name, seed, data
    weights_sha256: dict[Weights, str]  # of every kind of weights that it holds: one may be absent if it was imported

    def tensors(self, weights: Weights) -> dict[str, Tensor]:
        """The averaged or the bare weights by parameter name, on the CPU. Raises UserError where it has them not."""
        self.check_holds(weights)
        return load_file(self.path / FILES[weights])

    def network(self, weights: Weights) -> nn.Module:
        """The network with the averaged or the bare weights, in evaluation mode, on the CPU.

        Raises UserError when the export holds no such weights.
        """
        tensors = self.tensors(weights)
        network = build_model(self.config.model, self.config.diffusion)
        network.load_state_dict(tensors, strict=True)
        return network.eval().requires_grad_(False)

    def check_holds(self, weights: Weights) -> None:
        """Raises UserError, naming what there is, when the export holds no weights of this kind."""
        if weights not in self.weights_sha256:
            there = " and ".join(self.weights_sha256)
            raise UserError(f"weights={weights}: {self.path} holds only {there}; ask for weights={there}.")


def write_export(checkpoint: Path, exports: Path, *, run_id: str) -> Path:
    """Turn a checkpoint into `exports/<nimg>`, reading parameter by parameter; an existing one is kept."""
    reader = CheckpointReader(checkpoint)
    state = reader.state
    final = exports / checkpoint_name(state.nimg)
    if final.exists() and verify(final) is None:
        return final
    config = load_config(checkpoint / "config.yaml")
    info = export_info(config, nimg=state.nimg, compute=state.compute, run_id=run_id, data=state.data_fingerprint)
    weights: dict[Weights, Iterable[tuple[str, Tensor]]]
    weights = {"ema": reader.weights("ema"), "model": reader.weights("weight")}
    save_export(final, weights, config=(checkpoint / "config.yaml").read_bytes(), info=info)
    return final


def save_export(
    final: Path, weights: Mapping[Weights, Iterable[tuple[str, Tensor]]], *, config: str | bytes, info: dict[str, Any]
) -> None:
    """Write the folder `final` completely or not at all; what was there is replaced.

    `weights`: (parameter name, float32 tensor) of one kind or both, taken in when that kind is written; `config`: the
    resolved YAML; `info`: see `export_info`.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for kind, tensors in weights.items():
            save_file(dict(tensors), temporary / FILES[kind])
        write_atomic(temporary / "config.yaml", config)
        write_json(temporary / "export.json", info)
        names = [*(FILES[kind] for kind in weights), "config.yaml", "export.json"]
        for name in names:
            fsync_file(temporary / name)
        entries = {n: {"bytes": (temporary / n).stat().st_size, "sha256": sha256_file(temporary / n)} for n in names}
        write_json(temporary / MANIFEST, {"files": entries})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_file(final.parent)


def export_info(config: RunConfig, *, nimg: int, compute: float, run_id: str, data: str) -> dict[str, Any]:
    """What export.json says: images seen, training FLOPs, costs, and which run on which data (a fingerprint)."""
    cost = count(config.model, config.diffusion)
    return {
        "nimg": nimg,
        "compute": compute,
        "num_params": cost.num_params,
        "flops_per_image": cost.train_flops,
        "run": run_id,
        "name": config.name,
        "seed": config.seed,
        "data": data,
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
        weights_sha256={kind: files[name]["sha256"] for kind, name in FILES.items() if name in files},
    )
