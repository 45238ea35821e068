"""Another code base's checkpoint to an export of ours, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, UserError
from data_pipeline.files import sha256_file
from trainer.config.model import EncoderConfig
from trainer.config.run import RunConfig, load_config
from trainer.config.tree import to_yaml
from trainer.export import Weights, export_info, open_export, save_export
from trainer.interop import FORMATS
from trainer.interop.format import FileName, Format, Pair, Shape, meta_network
from trainer.interop.presets import find_preset, preset_names
from trainer.interop.pt_files import check_is_file, read_pt, write_pt
from trainer.models import count

UNKNOWN_DATA = "unknown"  # stands for the fingerprint of the training data
WRAPPER = "module."  # what DataParallel puts before every key
MAX_LISTED = 20  # keys of a kind in an error message


@dataclass(frozen=True)
class Source:
    """A checkpoint's file."""

    path: Path
    weights: Weights
    name: FileName


def import_checkpoint(
    checkpoint: Path, out: Path, config: RunConfig, *,
    model: Path | None = None, images: int | None = None, format_name: str = "improved-diffusion",
) -> dict[str, Any]:  # fmt: skip
    """Write the export `out` from one file of weights, or from the averaged and the bare ones (`model`).

    Returns what its export.json says; `source` there names the files and their hashes.

    `images`: images seen in training; by default the iterations in the file's name times train.global_batch.

    Raises:
        UserError: `out` is there already or below a file, a checkpoint is missing, damaged or does not fit the config
            (every key is listed), a value is not finite, or the number of images is not known.
    """
    form = FORMATS[format_name]
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already and not empty; name a new folder.")
    _check_parents(out)
    for path in (checkpoint, model):
        if path is not None:
            check_is_file(path)
    sources = _sources(checkpoint, model, form)
    _check_known(form, config, format_name)
    nimg = images if images is not None else _images_seen(sources, config)
    network = meta_network(config)
    pairs = list(form.pairs(network))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert {pair.ours for pair in pairs} == shapes.keys(), "the format's mapping leaves parameters out"

    read = {source.weights: read_pt(source.path) for source in sources}
    for source in sources:
        _check_fit(source.path, read[source.weights], pairs, form, config)
        _check_finite(source.path, read[source.weights])
    files = {source.weights: {"name": source.path.name, "sha256": sha256_file(source.path)} for source in sources}
    first = files[sources[0].weights]
    info = export_info(
        config, nimg=nimg, compute=nimg * count(config.model, config.diffusion).train_flops,
        run_id=f"imported-{first['sha256'][:16]}", data=UNKNOWN_DATA,
    )  # fmt: skip
    weights = {kind: dict(_renamed(tensors, pairs, shapes)).__getitem__ for kind, tensors in read.items()}
    info["source"] = {"format": format_name, "files": files}
    save_export(out, weights, shapes, config=to_yaml(config), info=info)
    return info


def export_checkpoint(
    export_path: Path, out: Path, *, weights: Weights = "ema", format_name: str = "improved-diffusion"
) -> list[str]:
    """Write an export's weights as another code base's checkpoint; the lines are the flags that its programs need.

    Raises:
        UserError: no export there, no such weights in it, or `out` is there already or below a file.
        ConfigError: the other code base cannot express the network; lists why.
    """
    form = FORMATS[format_name]
    if out.exists():
        raise UserError(f"--out {out} is there already; name a new file.")
    _check_parents(out)
    export = open_export(export_path)
    export.check_holds(weights)
    _check_known(form, export.config, format_name)
    flags = form.flags(export.config)
    ours = export.tensors(weights)
    pairs = form.pairs(meta_network(export.config))
    write_pt(out, {pair.theirs: ours[pair.ours].reshape(pair.shape) for pair in pairs})
    return flags


def _check_known(form: Format, config: RunConfig, format_name: str) -> None:
    """Raises ConfigError where the other code base has no such network."""
    reasons = list(form.refusals(config))
    if reasons:
        raise ConfigError(f"{format_name} has no such network:\n" + "\n".join(f"  {reason}" for reason in reasons))


def _check_parents(out: Path) -> None:
    """Raises UserError where `out` would lie below a file."""
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--out {out}: {parent} is a file, not a folder; choose another place.")


def _sources(checkpoint: Path, model: Path | None, form: Format) -> list[Source]:
    name = form.read_name(checkpoint.name)
    if model is None:
        return [Source(checkpoint, name.weights or "ema", name)]
    if name.weights == "model":
        raise UserError(
            f"{checkpoint.name} holds the bare weights, and so does --model {model.name}; name the averaged ones "
            "(ema_*.pt) first, or leave --model out."
        )
    return [Source(checkpoint, "ema", name), Source(model, "model", form.read_name(model.name))]


def _images_seen(sources: Sequence[Source], config: RunConfig) -> int:
    """Iterations times images an iteration, where the files' names tell both and agree with the config."""
    counts = {source.name.iterations for source in sources} - {None}
    names = " and ".join(source.path.name for source in sources)
    if len(counts) != 1:
        says = "different numbers of iterations" if counts else "no number of iterations"
        raise UserError(f"the name of {names} tells {says}; give --images N, the images seen in training.")
    for source in sources:
        for key, told, set_to in (
            ("global_batch", source.name.batch, config.train.global_batch),
            ("ema_decay", source.name.ema_decay, config.train.ema_decay),
        ):
            if told not in (None, set_to):
                raise ConfigError(
                    f"train.{key}={set_to}: the name of {source.path.name} tells {told}; "
                    f"add train.{key}={told}, or give --images N, the images seen in training."
                )
    return next(n for n in counts if n is not None) * config.train.global_batch


def _check_fit(
    path: Path, tensors: Mapping[str, Tensor], pairs: Sequence[Pair], form: Format, config: RunConfig
) -> None:
    """Raises UserError listing all keys that are missing, unexpected or of another shape, and which setting differs."""
    expected = {pair.theirs: pair.shape for pair in pairs}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found == expected:
        return
    if found and all(key.startswith(WRAPPER) for key in found):
        raise UserError(
            f"{path}: all keys start with {WRAPPER!r}, as DataParallel names them. Strip it and save the file again: "
            f"torch.save({{key.removeprefix({WRAPPER!r}): value for key, value in state.items()}}, path)."
        )
    lists = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key}: {list(found[key])}, expected {list(shape)}"
            for key, shape in expected.items()
            if found.get(key, shape) != shape
        ],
    }
    lines = [f"{path} does not fit the config {config.name}."]
    for what, keys in lists.items():
        if keys:
            more = [f"... and {len(keys) - MAX_LISTED} more"] if len(keys) > MAX_LISTED else []
            lines += [f"{len(keys)} {what}:", *(f"  {key}" for key in [*keys[:MAX_LISTED], *more])]
    for key, (theirs, ours) in form.differing_settings(found, config).items():
        lines.append(f"{key}: the file's network has {theirs}, the config {ours}.")
    fitting = [name for name in preset_names() if _expected_shapes(name, form) == found]
    lines.append(f"Presets that fit: {', '.join(fitting) or 'none'}.")
    raise UserError("\n".join(lines))


def _expected_shapes(preset: str, form: Format) -> dict[str, Shape] | None:
    """What a file of the preset's network holds; None where the other code base has no such network."""
    config = load_config(find_preset(preset))
    if not isinstance(config.model, EncoderConfig) or any(form.refusals(config)):
        return None
    return {pair.theirs: pair.shape for pair in form.pairs(meta_network(config))}


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {key} has values that are not finite: its training failed; use an earlier file.")


def _renamed(
    tensors: Mapping[str, Tensor], pairs: Sequence[Pair], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Tensor]]:
    """Our names, shapes and float32, one at a time; copies, since tensors of a file may share their memory."""
    for pair in pairs:
        tensor = tensors[pair.theirs].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        yield pair.ours, tensor.reshape(shapes[pair.ours])
