"""What the checkpoints of openai/improved-diffusion and openai/guided-diffusion have in common.

Their networks and ours are the same function of the same numbers; what differs is what the parameters are called,
and that their attention uses 1-d convolutions over flattened positions where ours uses 2-d ones or linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from trainer.config.model import ClassifierConfig
from trainer.config.run import RunConfig
from trainer.interop.format import FileName, Pair, encoder_of
from trainer.models.blocks import ResBlock
from trainer.models.encoder import EncoderNetwork, UNetBlock
from trainer.models.unet import UNet

NUM_CLASSES = 1000  # the only number of classes that their programs know
NUM_GROUPS = 32  # of every GroupNorm

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}
POOLS: dict[str, dict[str, str]] = {  # by model.pool; their `out` counts the layers without parameters too
    "attention": {"norm": "0", "position": "2.positional_embedding", "qkv": "2.qkv_proj", "proj": "2.c_proj"},
    "adaptive": {"norm": "0", "proj": "3"},
    "spatial": {"hidden": "0", "proj": "2"},
    "spatial_v2": {"hidden": "0", "norm": "1", "proj": "3"},
}
CONV1D = (".qkv", ".proj_out", ".qkv_proj", ".c_proj")


# Names of parameters


def pairs(network: EncoderNetwork) -> Iterator[Pair]:
    """Every parameter of our network with its name and shape there, in their order."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for ours, theirs in _parts(network):
        for leaf in ("", ".weight", ".bias"):
            shape = shapes.get(f"{ours}{leaf}")
            if shape is not None:  # an embedding has no bias, a skip connection of equal widths no parameters
                flattened = theirs.endswith(CONV1D) and leaf == ".weight"
                yield Pair(f"{ours}{leaf}", f"{theirs}{leaf}", (*shape[:2], 1) if flattened else shape)


def _parts(network: EncoderNetwork) -> Iterator[tuple[str, str]]:
    """(our module or parameter, theirs) of everything that may hold parameters."""
    yield "time_embed.0", "time_embed.0"
    yield "time_embed.2", "time_embed.2"
    yield "class_embed", "label_emb"
    yield "stem", "input_blocks.0.0"
    for i, step in enumerate(network.encoder):
        if isinstance(step, UNetBlock):
            yield from _block(f"encoder.{i}", f"input_blocks.{i + 1}", 0)
        elif isinstance(step, ResBlock):
            yield from _renamed(RES_BLOCK, f"encoder.{i}", f"input_blocks.{i + 1}.0")
        else:
            yield f"encoder.{i}", f"input_blocks.{i + 1}.0.op"
    yield from _block("middle.0", "middle_block", 0)  # takes 0 and, for its attention, 1
    yield from _block("middle.1", "middle_block", 2)
    if isinstance(network, UNet):
        yield from _decoder(network)
    else:
        assert isinstance(network.config, ClassifierConfig)
        yield from _renamed(POOLS[network.config.pool], "pool", "out")


def _decoder(network: UNet) -> Iterator[tuple[str, str]]:
    group = -1
    place = 0  # in their group: a decoder block, its attention, and the upsampling behind the level's last one
    for i, step in enumerate(network.decoder):
        if isinstance(step, UNetBlock):
            group += 1
            place = 1 if step.attention is None else 2
            yield from _block(f"decoder.{i}", f"output_blocks.{group}", 0)
        elif isinstance(step, ResBlock):
            yield from _renamed(RES_BLOCK, f"decoder.{i}", f"output_blocks.{group}.{place}")
        else:
            yield f"decoder.{i}.conv", f"output_blocks.{group}.{place}.conv"
    yield "out_norm", "out.0"
    yield "out_conv", "out.2"


def _block(ours: str, theirs: str, place: int) -> Iterator[tuple[str, str]]:
    """A residual block at `place` of their group, and the attention that follows it."""
    yield from _renamed(RES_BLOCK, f"{ours}.res", f"{theirs}.{place}")
    yield from _renamed(ATTENTION, f"{ours}.attention", f"{theirs}.{place + 1}")


def _renamed(names: Mapping[str, str], ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name, their_name in names.items():
        yield f"{ours}.{name}", f"{theirs}.{their_name}"


# Names of files


def training_name(name: str) -> FileName | None:
    """What a file that their training wrote tells by its name: `ema_0.9999_500000.pt`, `model500000.pt`."""
    if match := re.fullmatch(r"ema_([0-9.]+)_(\d+)\.pt", name):
        return FileName("ema", int(match[2]), ema_decay=float(match[1]))
    if match := re.fullmatch(r"model(\d+)\.pt", name):
        return FileName("model", int(match[1]))
    return None


# Flags of their programs


def flag_line(name: str, values: Mapping[str, object]) -> str:
    """A line for a shell: NAME="--flag value ...", all of them written out."""
    return f'{name}="' + " ".join(f"--{flag} {value}" for flag, value in values.items()) + '"'


def attention_sizes(config: RunConfig) -> tuple[int, ...]:
    """The feature map sizes with attention among those that the network really has, largest first."""
    model = encoder_of(config)
    return tuple(size for size in model.sizes if size in model.attention_resolutions)


def diffusion_flags(config: RunConfig) -> dict[str, object]:
    """What both code bases call DIFFUSION_FLAGS."""
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


def not_theirs(config: RunConfig) -> Iterator[str]:
    """Why neither code base has the network: it computes something else than theirs."""
    model = encoder_of(config)
    if model.rescale_residuals:
        yield "model.rescale_residuals=true: its blocks add their input as it is"
    if model.low_res_noise:
        yield "model.low_res_noise: its upsamplers are not told of noise on what they enlarge"


def inexpressible(config: RunConfig) -> Iterator[str]:
    """What their programs cannot be told of a network or of the process; the widths of levels apart."""
    model, diffusion = encoder_of(config), config.diffusion
    if any(width % NUM_GROUPS for width in (model.channels, *model.widths)):
        yield f"model.channels={model.channels}: its norms have {NUM_GROUPS} groups, which must divide the channels"
    if model.null_class:
        yield "model.null_class=true: it has no class for dropped labels"
    if model.num_classes not in (0, NUM_CLASSES):
        which = "classifiers" if isinstance(model, ClassifierConfig) else "class-conditional networks"
        yield f"model.num_classes={model.num_classes}: its {which} have {NUM_CLASSES} classes"
    if diffusion.schedule == "sigmoid":
        yield "diffusion.schedule=sigmoid: its schedules are linear and cosine"
    if diffusion.prediction not in ("eps", "x0"):
        yield f"diffusion.prediction={diffusion.prediction}: its networks predict eps or x0"
    if diffusion.variance == "learned":
        yield "diffusion.variance=learned: it learns a variance within a range (learned_range), or none"


def training_only(config: RunConfig) -> Iterator[str]:
    """What a training that goes on there would do otherwise; sampling and likelihoods are the same."""
    diffusion = config.diffusion
    if diffusion.objective == "hybrid" and diffusion.vlb_factor not in (1 / 1000, 1 / diffusion.num_timesteps):
        yield f"training only: no flag for diffusion.vlb_weight={diffusion.vlb_weight}; it knows 1/1000 and 1/T"
    if diffusion.mse_target not in (None, diffusion.prediction):
        yield f"training only: no flag for diffusion.mse_target={diffusion.mse_target}"
    if diffusion.loss_weight != "none":
        yield f"training only: no flag for diffusion.loss_weight={diffusion.loss_weight}"


def widths_problem(config: RunConfig, known: Mapping[int, tuple[float, ...]], what: str) -> Iterator[str]:
    """Where image size and multipliers are none of the `known` ones, which their programs take by the size."""
    model = encoder_of(config)
    if model.image_size not in known:
        sizes = ", ".join(map(str, known))
        yield f"model.image_size={model.image_size}: it knows {what} for {sizes} pixels only"
    elif model.channel_mult != known[model.image_size]:
        own = list(known[model.image_size])
        yield (
            f"model.channel_mult={list(model.channel_mult)}: it has no flag for it, and always {own} "
            f"at {model.image_size} pixels"
        )
