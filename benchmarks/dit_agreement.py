"""Our diffusion transformer against diffusers' with the same weights: `python -m benchmarks.dit_agreement`.

Outputs and gradients as one vector each, distance over length, in float32; every weight is random, none of them zero.
The peer, DiTTransformer2DModel, spaces the frequencies of its time embedding by 127 steps where Improved DDPM and ours
have 128, and its second layer norm has another epsilon by default: both are set to ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import INSTALL_DIFFUSERS
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.config.model import DiTConfig
from trainer.models.dit import DiT

CLASSES: dict[str, Any] = {"num_classes": 1000, "null_class": True}
# name: network, channels of its images
NETWORKS: dict[str, tuple[DiTConfig, int]] = {
    "tiny, 32 px, patch 4": (DiTConfig(image_size=32, patch_size=4, width=64, depth=3, num_heads=4, **CLASSES), 3),
    "S, 64 px, patch 4": (DiTConfig(image_size=64, patch_size=4, size="S", **CLASSES), 3),
    "S, 4x32x32 latents, patch 2": (DiTConfig(image_size=32, patch_size=2, size="S", **CLASSES), 4),
    "B, 4x32x32 latents, patch 4": (DiTConfig(image_size=32, patch_size=4, size="B", **CLASSES), 4),
    "L, 4x32x32 latents, patch 8": (DiTConfig(image_size=32, patch_size=8, size="L", **CLASSES), 4),
}


def peer(config: DiTConfig, *, in_channels: int, out_channels: int) -> nn.Module:
    """diffusers' network of the same structure. Raises UserError where diffusers is not installed."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise UserError(
            f"the peer needs diffusers, which cannot be imported ({error}); install it with: {INSTALL_DIFFUSERS}"
        ) from error
    network: nn.Module = DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.width // config.num_heads,
        in_channels=in_channels, out_channels=out_channels, num_layers=config.depth, sample_size=config.image_size,
        patch_size=config.patch_size, num_embeds_ada_norm=config.num_classes, norm_eps=1e-6,
    )  # fmt: skip
    for module in network.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0  # type: ignore[assignment]
    return network.eval()  # it drops labels by itself while training


def peer_weights(ours: DiT) -> dict[str, Tensor]:
    """Our weights by the peer's names, as views of ours. Its blocks each embed time and class, with copies."""
    config, weights = ours.config, dict(ours.named_parameters())

    def layer(theirs: str, name: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            yield f"{theirs}.{kind}", weights[f"{name}.{kind}"]

    found = dict(layer("proj_out_1", "out_modulation")) | dict(layer("proj_out_2", "out_proj"))
    for key in ("proj_out_2.weight", "proj_out_2.bias"):  # its pixels come before its channels
        value = found[key].unflatten(0, (-1, config.patch_size**2))
        found[key] = value.transpose(0, 1).flatten(0, 1)
    kernel = weights["patch_embed.weight"].unflatten(1, (-1, config.patch_size, config.patch_size))
    found |= {"pos_embed.proj.weight": kernel, "pos_embed.proj.bias": weights["patch_embed.bias"]}
    for number in range(config.depth):
        block, name = f"transformer_blocks.{number}", f"blocks.{number}"
        found |= dict(layer(f"{block}.norm1.emb.timestep_embedder.linear_1", "time_embed.0"))
        found |= dict(layer(f"{block}.norm1.emb.timestep_embedder.linear_2", "time_embed.2"))
        found[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = weights["class_embed.weight"]
        found |= dict(layer(f"{block}.norm1.linear", f"{name}.modulation"))
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", weights[f"{name}.attention.qkv.{kind}"].chunk(3), strict=True):
                found[f"{block}.attn1.to_{part}.{kind}"] = value
        found |= dict(layer(f"{block}.attn1.to_out.0", f"{name}.attention.proj"))
        found |= dict(layer(f"{block}.ff.net.0.proj", f"{name}.mlp.0")) | dict(
            layer(f"{block}.ff.net.2", f"{name}.mlp.2")
        )
    return found


def compare(config: DiTConfig, channels: int) -> dict[str, float]:
    """How far outputs and gradients of all our weights are apart."""
    torch.manual_seed(0)
    ours = DiT(config, in_channels=channels, out_channels=2 * channels)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    theirs = peer(config, in_channels=channels, out_channels=2 * channels)
    x = torch.randn(2, channels, config.image_size, config.image_size)
    time, labels = 1000 * torch.rand(2), torch.tensor([7, -1])
    own = ours(x, time, labels)
    weights = peer_weights(ours)
    theirs.load_state_dict({name: value.detach() for name, value in weights.items()}, strict=False)
    assert weights.keys() == {name for name, _ in theirs.named_parameters()}
    # Called with our own weights as its parameters, so that its gradients come back by our names, copies summed.
    rows = torch.where(labels < 0, config.num_classes, labels)
    their = torch.func.functional_call(theirs, weights, (x, time, rows)).sample
    along = torch.randn_like(own)
    parameters = tuple(ours.parameters())
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, along)]) for output in (own, their)
    ]
    return {"forward": distance(own, their), "gradients": distance(*gradients)}


def distance(a: Tensor, b: Tensor) -> float:
    """Over the length of b."""
    return float(((a - b).norm() / b.norm()).detach())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{'':32}{'forward':>12}{'gradients':>12}")
    for name, (config, channels) in NETWORKS.items():
        apart = compare(config, channels)
        rows.append({"network": name} | apart)
        print(f"{name:32}{apart['forward']:12.1e}{apart['gradients']:12.1e}", flush=True)
    if options.json is not None:
        write_json(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    run_cli(main)
