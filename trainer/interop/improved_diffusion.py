"""Checkpoints of openai/improved-diffusion (the code of Nichol & Dhariwal 2021): names, shapes, flags.

Their networks and ours are the same function of the same numbers; what differs is what the parameters are called,
and that their attention uses 1-d convolutions over flattened positions where ours uses 2-d ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from data_pipeline.errors import ConfigError
from trainer.config import RunConfig
from trainer.interop.format import FileName, Pair, Shape, unet_of
from trainer.models.blocks import Downsample
from trainer.models.unet import UNet, UNetBlock

NUM_CLASSES = 1000  # the only number of classes their programs know
NUM_GROUPS = 32  # of every GroupNorm
CHANNEL_MULT: dict[int, tuple[int, ...]] = {  # by image size: their programs have no flag for it
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
SUPER_RESOLUTION_SIZES = (64, 256)

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}


# Names of parameters


def pairs(network: UNet) -> Iterator[Pair]:
    """Every parameter of our network with its name and shape there, in their order."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for ours, theirs in _modules(network):
        flattened = theirs.endswith((".qkv", ".proj_out"))  # their Conv1d: [out, in, 1], ours [out, in, 1, 1]
        for leaf in ("weight", "bias"):
            shape = shapes.get(f"{ours}.{leaf}")
            if shape is not None:  # an embedding has no bias, a skip connection of equal widths no parameters
                yield Pair(f"{ours}.{leaf}", f"{theirs}.{leaf}", shape[:3] if flattened else shape)


def _modules(network: UNet) -> Iterator[tuple[str, str]]:
    """(our module, their module) of everything that may hold parameters."""
    yield "time_embed.0", "time_embed.0"
    yield "time_embed.2", "time_embed.2"
    yield "class_embed", "label_emb"
    yield "stem", "input_blocks.0.0"
    for i, step in enumerate(network.encoder):
        if isinstance(step, Downsample):
            yield f"encoder.{i}", f"input_blocks.{i + 1}.0.op"
        else:
            yield from _block(f"encoder.{i}", f"input_blocks.{i + 1}", 0)
    yield from _block("middle.0", "middle_block", 0)  # takes 0 and, for its attention, 1
    yield from _block("middle.1", "middle_block", 2)
    group = -1
    place = 0  # in their group: a decoder block, its attention, and the upsampling behind the level's last one
    for i, step in enumerate(network.decoder):
        if isinstance(step, UNetBlock):
            group += 1
            place = 1 if step.attention is None else 2
            yield from _block(f"decoder.{i}", f"output_blocks.{group}", 0)
        else:
            yield f"decoder.{i}.conv", f"output_blocks.{group}.{place}.conv"
    yield "out_norm", "out.0"
    yield "out_conv", "out.2"


def _block(ours: str, theirs: str, place: int) -> Iterator[tuple[str, str]]:
    """A residual block at `place` of their group, and the attention that follows it."""
    for name, their_name in RES_BLOCK.items():
        yield f"{ours}.res.{name}", f"{theirs}.{place}.{their_name}"
    for name, their_name in ATTENTION.items():
        yield f"{ours}.attention.{name}", f"{theirs}.{place + 1}.{their_name}"


# Names of files


def read_name(name: str) -> FileName:
    """What a file's name tells: those that their training writes, and those that were published.

    `ema_0.9999_500000.pt`, `model500000.pt`; `cifar10_uncond_50M_500K.pt`, `lsun_uncond_100M_2400K_bs64.pt` (averages).
    """
    if match := re.fullmatch(r"ema_([0-9.]+)_(\d+)\.pt", name):
        return FileName("ema", int(match[2]), ema_decay=float(match[1]))
    if match := re.fullmatch(r"model(\d+)\.pt", name):
        return FileName("model", int(match[1]))
    if match := re.fullmatch(r".+_(\d+)K(?:_bs(\d+))?\.pt", name):
        return FileName("ema", 1000 * int(match[1]), batch=int(match[2]) if match[2] else None)
    return FileName()


# What the shapes tell


def differing_settings(shapes: Mapping[str, Shape], config: RunConfig) -> dict[str, tuple[object, object]]:
    """Settings in which a file differs from a config, as far as its shapes tell: key -> (file, config).

    The number of heads, the image size and the diffusion process leave no trace in shapes.
    """
    levels = _levels(shapes)
    needed = ("time_embed.0.weight", "middle_block.0.emb_layers.1.weight", "middle_block.0.out_layers.3.weight")
    if not levels[0] or [len(shapes.get(key, ())) for key in needed] != [2, 2, 4] or 0 in shapes[needed[0]]:
        return {}  # no network of theirs
    channels, emb_rows, middle_width = shapes[needed[0]][1], shapes[needed[1]][0], shapes[needed[2]][0]
    widths = [shapes[f"input_blocks.{blocks[0]}.0.in_layers.2.weight"][0] for blocks in levels if blocks]
    attention = [f"input_blocks.{blocks[0]}.1.qkv.weight" in shapes for blocks in levels if blocks]
    model = unet_of(config)
    found: dict[str, tuple[object, object]] = {
        "model.channels": (channels, model.channels),
        "model.channel_mult": (tuple(width // channels for width in widths), model.channel_mult),
        "model.num_res_blocks": (len(levels[0]), model.num_res_blocks),
        f"model.attention_resolutions (at {model.image_size} pixels)": (
            tuple(model.image_size // 2**level for level, has in enumerate(attention) if has),
            attention_sizes(config),
        ),
        "model.num_classes": (sum(shapes.get("label_emb.weight", ())[:1]), model.num_classes + model.null_class),
        "model.use_scale_shift_norm": (emb_rows == 2 * middle_width, model.use_scale_shift_norm),
        "model.low_res_size > 0": (shapes.get("input_blocks.0.0.weight", ())[1:2] == (6,), model.low_res_size > 0),
        "a learned diffusion.variance": (shapes.get("out.2.bias") == (6,), config.diffusion.learns_variance),
    }
    return {key: (theirs, ours) for key, (theirs, ours) in found.items() if theirs != ours}


def _levels(shapes: Mapping[str, Shape]) -> list[list[int]]:
    """Numbers of the encoder's blocks, level by level."""
    numbers = {int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d+)\.", key))}
    levels: list[list[int]] = [[]]
    for number in sorted(numbers):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        elif len(shapes.get(f"input_blocks.{number}.0.in_layers.2.weight", ())) == 4:
            levels[-1].append(number)
    return levels


def attention_sizes(config: RunConfig) -> tuple[int, ...]:
    """The feature map sizes with attention among those that the network really has, largest first."""
    model = unet_of(config)
    sizes = [model.image_size // 2**level for level in range(len(model.channel_mult))]
    return tuple(size for size in sizes if size in model.attention_resolutions)


# What their command lines are told


def flags(config: RunConfig) -> list[str]:
    """MODEL_FLAGS and DIFFUSION_FLAGS for their scripts, all written out, as lines for a shell.

    Raises ConfigError listing every setting that changes what the network computes and that they have no flag for.
    """
    problems = list(_inexpressible(config))
    if problems:
        raise ConfigError("improved-diffusion cannot express this network:\n" + "\n".join(f"  {p}" for p in problems))
    lines = [f'MODEL_FLAGS="{_joined(_model_flags(config))}"', f'DIFFUSION_FLAGS="{_joined(_diffusion_flags(config))}"']
    return [*lines, *(f"# {note}" for note in _training_only(config))]


def _joined(values: Mapping[str, object]) -> str:
    return " ".join(f"--{name} {value}" for name, value in values.items())


def _model_flags(config: RunConfig) -> dict[str, object]:
    model, variance = unet_of(config), config.diffusion.variance
    size: dict[str, object] = {"image_size": model.image_size}
    if model.low_res_size:
        size = {"large_size": model.image_size, "small_size": model.low_res_size}
    values: dict[str, object] = size | {
        "num_channels": model.channels,
        "num_res_blocks": model.num_res_blocks,
        "num_heads": model.num_heads,
        # A size that no level has stands for none: their parser takes no empty list.
        "attention_resolutions": ",".join(str(s) for s in attention_sizes(config)) or "1",
        "dropout": model.dropout,
        "class_cond": model.num_classes > 0,
        "use_scale_shift_norm": model.use_scale_shift_norm,
        "learn_sigma": variance == "learned_range",
    }
    return values if model.low_res_size else values | {"sigma_small": variance == "fixed_small"}


def _diffusion_flags(config: RunConfig) -> dict[str, object]:
    diffusion = config.diffusion
    return {
        "diffusion_steps": diffusion.num_timesteps,
        "noise_schedule": diffusion.schedule,
        "predict_xstart": diffusion.prediction == "x0",
        "rescale_timesteps": diffusion.rescale_timesteps,
        # At T = 1000 both weights are the same number; the name then says which was meant.
        "rescale_learned_sigmas": diffusion.vlb_weight != "unrescaled" and diffusion.vlb_factor == 1 / 1000,
        "use_kl": diffusion.objective == "vlb",
    }


def _inexpressible(config: RunConfig) -> Iterator[str]:
    model, diffusion = unet_of(config), config.diffusion
    sizes = SUPER_RESOLUTION_SIZES if model.low_res_size else tuple(CHANNEL_MULT)
    if model.image_size not in sizes:
        what = "super-resolution networks" if model.low_res_size else "networks"
        known = ", ".join(map(str, sizes))
        yield f"model.image_size={model.image_size}: it knows {what} for {known} pixels only"
    elif model.channel_mult != CHANNEL_MULT[model.image_size]:
        own = list(CHANNEL_MULT[model.image_size])
        yield (
            f"model.channel_mult={list(model.channel_mult)}: it has no flag for it, and always {own} "
            f"at {model.image_size} pixels"
        )
    if model.channels % NUM_GROUPS:
        yield f"model.channels={model.channels}: its norms have {NUM_GROUPS} groups, which must divide the channels"
    if model.null_class:
        yield "model.null_class=true: it has no class for dropped labels"
    if model.num_classes not in (0, NUM_CLASSES):
        yield f"model.num_classes={model.num_classes}: its class-conditional networks have {NUM_CLASSES} classes"
    if diffusion.schedule == "sigmoid":
        yield "diffusion.schedule=sigmoid: its schedules are linear and cosine"
    if diffusion.prediction not in ("eps", "x0"):
        yield f"diffusion.prediction={diffusion.prediction}: its networks predict eps or x0"
    if diffusion.variance == "learned":
        yield "diffusion.variance=learned: it learns a variance within a range (learned_range), or none"
    if diffusion.variance == "fixed_small" and model.low_res_size:
        yield "diffusion.variance=fixed_small: its super-resolution programs know fixed_large only"


def _training_only(config: RunConfig) -> Iterator[str]:
    """What a training that goes on there would do otherwise; sampling and likelihoods are the same."""
    diffusion = config.diffusion
    if diffusion.objective == "hybrid" and diffusion.vlb_factor not in (1 / 1000, 1 / diffusion.num_timesteps):
        yield f"training only: no flag for diffusion.vlb_weight={diffusion.vlb_weight}; it knows 1/1000 and 1/T"
    if diffusion.mse_target not in (None, diffusion.prediction):
        yield f"training only: no flag for diffusion.mse_target={diffusion.mse_target}"
    if diffusion.loss_weight != "none":
        yield f"training only: no flag for diffusion.loss_weight={diffusion.loss_weight}"
