"""An export: the weights, their averages and the config. All that evaluation needs, without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.files import file_entry, fsync_file, write_atomic, write_json
from trainer.checkpoint import MANIFEST, CheckpointReader, checkpoint_name, verify
from trainer.config.run import RunConfig, load_config
from trainer.models import build_model, count
from trainer.tensor_files import Shape, write_tensors

Weights = str  # "model" the bare ones, "ema" their average, "ema_0.999" or "power_0.05" one of further averages
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Export:
    """An opened export."""

    path: Path
    config: RunConfig
    info: dict[str, Any]  # export.json: nimg, compute, num_params, flops_per_image, run, name, seed, data
    weights_sha256: dict[Weights, str]  # of every kind of weights that it holds: one may be absent if it was imported
    config_sha256: str  # of config.yaml

    def reconstruction(self, weights: Weights) -> dict[str, Any] | None:
        """Of an average made after training the error of its profile and the number of snapshots; None of others."""
        found: dict[str, Any] | None = self.info.get("reconstructed", {}).get(weights)
        return found

    def tensors(self, weights: Weights) -> dict[str, Tensor]:
        """The averaged or the bare weights by parameter name, on the CPU. Raises UserError where it has them not."""
        self.check_holds(weights)
        return load_file(self.path / f"{weights}{SUFFIX}")

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
            there = ", ".join(self.weights_sha256)
            raise UserError(f"weights={weights}: {self.path} holds only {there}; ask for one of these.")


def write_export(
    checkpoint: Path, exports: Path, *, run_id: str, kinds: Collection[Weights] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Turn a checkpoint into `exports/<nimg>`, reading parameter by parameter; an existing one is kept.

    `kinds`: what it holds; default: the bare weights and all averages. Raises UserError for a weight that `dtype`
    cannot hold.
    """
    reader = CheckpointReader(checkpoint)
    state = reader.state
    final = exports / checkpoint_name(state.nimg)
    if final.exists() and verify(final) is None:
        return final
    config = load_config(checkpoint / "config.yaml")
    info = export_info(config, nimg=state.nimg, compute=state.compute, run_id=run_id, data=state.data_fingerprint)
    weights: dict[Weights, Callable[[str], Tensor]] = {
        kind: partial(_read, reader, "weight" if kind == "model" else kind, dtype)
        for kind in kinds or (*config.train.averages, "model")
    }
    text = (checkpoint / "config.yaml").read_bytes()
    save_export(final, weights, reader.shapes, config=text, info=info, dtype=dtype)
    return final


def _read(reader: CheckpointReader, kind: str, dtype: torch.dtype, name: str) -> Tensor:
    whole = reader.whole(kind, name)
    if whole.numel() and (largest := float(whole.abs().max())) > torch.finfo(dtype).max:
        raise UserError(
            f"{kind} {name!r} holds {largest:g}: too large for train.ema_snapshot_precision=fp16; use fp32."
        )
    return whole.to(dtype)


def save_export(
    final: Path, weights: Mapping[Weights, Callable[[str], Tensor]], shapes: Mapping[str, Shape],
    *, config: str | bytes, info: dict[str, Any], dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write the folder `final` completely or not at all; what was there is replaced.

    `weights`: for each kind, what gives a parameter's values of `dtype` by its name, asked for one at a time;
    `shapes`: of all parameters; `config`: the resolved YAML; `info`: see `export_info`.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    specs = {name: (shape, dtype) for name, shape in shapes.items()}
    try:
        files = {
            f"{kind}{SUFFIX}": write_tensors(temporary / f"{kind}{SUFFIX}", specs, weights[kind]) for kind in weights
        }
        write_atomic(temporary / "config.yaml", config)
        write_json(temporary / "export.json", info)
        files |= {name: file_entry(temporary / name) for name in ("config.yaml", "export.json")}
        write_json(temporary / MANIFEST, {"files": files})
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
        weights_sha256={n.removesuffix(SUFFIX): entry["sha256"] for n, entry in files.items() if n.endswith(SUFFIX)},
        config_sha256=files["config.yaml"]["sha256"],
    )
