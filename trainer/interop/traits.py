"""What the shapes in a checkpoint of OpenAI's networks tell about its settings, to say why it does not fit.

The number of heads, the order of attention, the image size and the diffusion process leave no trace in shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from trainer.config.run import RunConfig
from trainer.interop.format import Shape, encoder_of, meta_network
from trainer.interop.openai_unet import POOLS, pairs

Traits = dict[str, object]


def differing_settings(shapes: Mapping[str, Shape], config: RunConfig) -> dict[str, tuple[object, object]]:
    """Settings in which a file differs from a config, as far as its shapes tell: key -> (file, config)."""
    expected = {pair.theirs: pair.shape for pair in pairs(meta_network(config))}
    image_size = encoder_of(config).image_size
    found, ours = (dict(_traits(each, image_size)) for each in (shapes, expected))
    if found and found["model.name"] != ours["model.name"]:
        return {"model.name": (found["model.name"], ours["model.name"])}  # the rest follows from that
    return {key: (value, ours[key]) for key, value in found.items() if key in ours and value != ours[key]}


def _traits(shapes: Mapping[str, Shape], image_size: int) -> Iterator[tuple[str, object]]:
    """Key and value of every setting that shapes tell; nothing where they are no network of theirs."""
    time_shape = shapes.get("time_embed.0.weight", ())
    emb_shape = shapes.get("middle_block.0.emb_layers.1.weight", ())
    middle_shape = shapes.get("middle_block.0.out_layers.3.weight", ())
    if [len(shape) for shape in (time_shape, emb_shape, middle_shape)] != [2, 2, 4] or 0 in time_shape:
        return
    is_unet = any(key.startswith("output_blocks.") for key in shapes)
    yield "model.name", "unet" if is_unet else "classifier"
    yield "model.channels", time_shape[1]
    yield "model.use_scale_shift_norm", emb_shape[0] == 2 * middle_shape[0]
    yield "model.resblock_updown", not any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key) for key in shapes)
    if is_unet:
        yield from _unet_traits(shapes, time_shape[1], image_size)
    else:
        yield from _classifier_traits(shapes)


def _unet_traits(shapes: Mapping[str, Shape], channels: int, image_size: int) -> Iterator[tuple[str, object]]:
    levels = _decoder_levels(shapes)
    mult = tuple(level[0][0] / channels for level in levels if level)
    yield "model.channel_mult", tuple(int(m) if m.is_integer() else m for m in mult)
    yield "model.num_res_blocks", len(levels[0]) - 1
    attending = tuple(image_size // 2**number for number, level in enumerate(levels) if level and level[0][1])
    yield f"model.attention_resolutions (at {image_size} pixels)", attending
    yield "model.num_classes", sum(shapes.get("label_emb.weight", ())[:1])
    yield "model.low_res_size > 0", shapes.get("input_blocks.0.0.weight", ())[1:2] == (6,)
    yield "a learned diffusion.variance", shapes.get("out.2.bias") == (6,)


def _classifier_traits(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, object]]:
    numbers = sorted(_numbers(shapes, "input_blocks"))
    widths = (shapes.get(f"input_blocks.{n}.0.out_layers.3.weight", ()) for n in numbers)
    yield "model.channel_mult and num_res_blocks (widths of the blocks)", tuple(w[0] for w in widths if len(w) == 4)
    attending = tuple(n for n in numbers if f"input_blocks.{n}.1.qkv.weight" in shapes)
    yield "model.attention_resolutions (numbers of the blocks)", attending
    out = {key.removeprefix("out.").removesuffix(".weight") for key in shapes if re.fullmatch(r"out\..*\.weight", key)}
    out |= {"2.positional_embedding"} & {key.removeprefix("out.") for key in shapes}
    pool = next((name for name, names in POOLS.items() if set(names.values()) == out), None)
    if pool is not None:
        yield "model.pool", pool
        yield "model.num_classes", sum(shapes.get(f"out.{POOLS[pool]['proj']}.bias", ())[:1])
    position = shapes.get("out.2.positional_embedding", ())
    if len(position) == 2 and position[1] > 1:
        yield "model.image_size (size of the pooled feature maps)", math.isqrt(position[1] - 1)


def _numbers(shapes: Mapping[str, Shape], group: str) -> set[int]:
    return {int(match[1]) for key in shapes if (match := re.match(rf"{group}\.(\d+)\.", key))}


def _decoder_levels(shapes: Mapping[str, Shape]) -> list[list[tuple[int, bool]]]:
    """Width and attention of the decoder's blocks, level by level from the first; an upsampling ends a level."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for n in sorted(_numbers(shapes, "output_blocks")):
        shape = shapes.get(f"output_blocks.{n}.0.out_layers.3.weight", ())
        if len(shape) == 4:
            levels[0].append((shape[0], f"output_blocks.{n}.1.qkv.weight" in shapes))
        behind = (f"output_blocks.{n}.{place}.{part}.weight" for place in (1, 2) for part in ("conv", "in_layers.2"))
        if any(key in shapes for key in behind):
            levels.insert(0, [])
    return levels
