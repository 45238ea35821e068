"""ADM's networks, classifiers and guided sampling against the published code: `python -m benchmarks.adm_agreement`.

`--peer-path` names a checkout of openai/guided-diffusion (the code of Dhariwal & Nichol 2021). Both get the same
weights, none of them zero, and the same inputs and noise. Networks: distance over length of the output, of the
gradients of all parameters, and of a classifier's gradient in the noisy image, all in float32. Guided sampling loops:
the largest difference relative to an image's largest value, each with its own networks, and both with ours; then also
with the arithmetic of the process in float64, which theirs has in float32.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.agreement import HEADER, LOOPS, Table, gather_float64, load_reference, relative
from data_pipeline.errors import run_cli
from data_pipeline.files import write_json
from trainer.conditions import Conditions
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ClassifierConfig, EncoderConfig, UNetConfig
from trainer.config.run import load_config
from trainer.diffusion.classifier_guidance import classifier_score
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS
from trainer.interop.openai_unet import pairs
from trainer.interop.presets import find_preset
from trainer.models import IMAGE_CHANNELS, build_model
from trainer.models.encoder import EncoderNetwork

PROCESS = DiffusionConfig(num_timesteps=1000, schedule="linear", rescale_timesteps=False)
BASE: dict[str, Any] = {
    "image_size": 64, "channels": 64, "channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (32, 16),
    "num_head_channels": 32, "resblock_updown": True, "num_classes": 10,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **BASE, "image_size": 32, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
    "attention_resolutions": (16,),
}  # fmt: skip
POOLS: tuple[Any, ...] = ("attention", "adaptive", "spatial", "spatial_v2")
NETWORKS: dict[str, EncoderConfig] = {
    "UNet, new order": UNetConfig(**BASE, attention_order="qkv_first"),
    "UNet, old order": UNetConfig(**BASE),
    "UNet, four heads, no classes": UNetConfig(**BASE | {"num_head_channels": None, "num_classes": 0}),
    "UNet, half-width first level": UNetConfig(**BASE | {"channel_mult": (0.5, 1, 2)}),
    "UNet, single convolutions": UNetConfig(**BASE | {"resblock_updown": False, "use_scale_shift_norm": False}),
    "upsampler": UNetConfig(**BASE, low_res_size=16),
    **{f"classifier, {pool} pool": ClassifierConfig(**BASE, pool=pool) for pool in POOLS},
}
PUBLISHED = ("imagenet64/adm", "imagenet64/classifier", "imagenet128/classifier")  # with --published
RESPACINGS = ("25", "ddim25", "10,5,5")
SCALES = (1.0, 10.0)


def their_network(reference: Any, config: EncoderConfig, *, out_channels: int) -> nn.Module:
    """Theirs of our config, by their constructors' own arguments."""
    classifies = isinstance(config, ClassifierConfig)
    settings: dict[str, Any] = {
        "model_channels": config.channels, "out_channels": out_channels, "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": tuple(config.image_size // size for size in config.attention_resolutions),
        "channel_mult": config.channel_mult, "num_heads": config.num_heads,
        "num_head_channels": config.num_head_channels or -1, "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_updown, "use_new_attention_order": config.attention_order == "qkv_first",
    }  # fmt: skip
    if classifies:
        settings["pool"] = config.pool  # type: ignore[attr-defined]
    else:
        settings["num_classes"] = config.num_classes or None
    name = "EncoderUNetModel" if classifies else "SuperResModel" if config.low_res_size else "UNetModel"
    network: nn.Module = getattr(reference.unet, name)(config.image_size, IMAGE_CHANNELS, **settings)
    return network


def networks(reference: Any, config: EncoderConfig) -> tuple[EncoderNetwork, nn.Module]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    objective = "cross_entropy" if isinstance(config, ClassifierConfig) else "hybrid"
    ours = build_model(config, PROCESS.model_copy(update={"objective": objective}))
    assert isinstance(ours, EncoderNetwork)
    weights = {name: (p + 0.03 * torch.randn_like(p)).detach() for name, p in ours.named_parameters()}
    ours.load_state_dict(weights)
    outputs = config.num_classes if isinstance(config, ClassifierConfig) else 2 * IMAGE_CHANNELS
    theirs = their_network(reference, config, out_channels=outputs)
    theirs.load_state_dict({pair.theirs: weights[pair.ours].reshape(pair.shape) for pair in pairs(ours)})
    return ours.eval(), theirs.eval()


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def compare_networks(table: Table, name: str, config: EncoderConfig) -> None:
    """Output and gradients, those in a classifier's image among them."""
    ours, theirs = networks(table.reference, config)
    batch, size, low = 2 if config.channels < 128 else 1, config.image_size, config.low_res_size
    x, t = torch.randn(batch, IMAGE_CHANNELS, size, size, requires_grad=True), 1000 * torch.rand(batch)
    labels = torch.randint(max(config.num_classes, 1), (batch,))
    conditions: dict[str, Tensor] = {"y": labels} if config.hears_classes else {}
    if low:
        conditions["low_res"] = torch.randn(batch, IMAGE_CHANNELS, low, low)

    def outputs() -> tuple[Tensor, Tensor]:  # anew for every gradient: theirs can be asked for once
        return ours(x, t, conditions.get("y"), conditions.get("low_res")), theirs(x, t, **conditions)

    if isinstance(config, ClassifierConfig):
        scores = [torch.autograd.grad(log_p(logits, labels), x)[0] for logits in outputs()]
        table.row(f"{name}: log p in x_t", "float32").note(apart=distance(*scores))
    own, their = outputs()
    table.row(f"{name}: output", "float32").note(apart=distance(own, their))
    along = torch.randn_like(own)
    found = list(pairs(ours))
    our_parameters = [ours.get_parameter(pair.ours) for pair in found]
    their_parameters = [theirs.get_parameter(pair.theirs) for pair in found]
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, along)])
        for output, parameters in ((own, our_parameters), (their, their_parameters))
    ]
    table.row(f"{name}: gradients", "float32").note(apart=distance(*gradients))


def log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels].sum()


class InFloat32(nn.Module):
    """A network that computes in float32 whatever the precision of the images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, *conditions: Tensor | None, **named: Tensor) -> Tensor:
        output: Tensor = self.network(x.float(), time, *conditions, **named)
        return output.to(x.dtype)


class Guided:
    """A network and a classifier on one process, ours and theirs, and what the loops draw."""

    def __init__(self, table: Table, respacing: str) -> None:
        self.gaussian = table.reference.gaussian_diffusion
        pairs_of_two = (networks(table.reference, kind(**SMALL)) for kind in (UNetConfig, ClassifierConfig))
        self.networks, self.classifiers = (tuple(map(InFloat32, two)) for two in pairs_of_two)
        self.ours = GaussianDiffusion.create(PROCESS, respacing=respacing)
        self.theirs = table.reference.respace.SpacedDiffusion(
            use_timesteps=table.reference.respace.space_timesteps(1000, respacing),
            betas=self.gaussian.get_named_beta_schedule("linear", 1000),
            model_mean_type=self.gaussian.ModelMeanType.EPSILON,
            model_var_type=self.gaussian.ModelVarType.LEARNED_RANGE,
            loss_type=self.gaussian.LossType.MSE,
        )
        torch.manual_seed(1)
        self.labels = torch.tensor([3, 7])
        self.x = torch.randn(2, IMAGE_CHANNELS, 32, 32)
        self.noise = torch.randn(self.ours.num_timesteps, *self.x.shape)

    def our_loop(self, eta: float | None, scale: float, dtype: torch.dtype) -> Tensor:
        conditions = Conditions(labels=self.labels)
        predictor = Predictor(
            lambda x, time: self.networks[0](x, time, *conditions), self.ours,
            score=classifier_score(self.classifiers[0], self.labels, scale=scale),
        )  # fmt: skip
        noise = iter(self.noise.to(dtype)).__next__
        with torch.no_grad():
            if eta is None:
                return SAMPLERS["ancestral"](predictor, self.x.to(dtype), noise=noise)
            return SAMPLERS["ddim"](predictor, self.x.to(dtype), noise=noise, eta=eta)

    def their_loop(self, eta: float | None, scale: float, dtype: torch.dtype, *, own_networks: bool) -> Tensor:
        network, classifier = self.networks[own_networks], self.classifiers[own_networks]

        def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return scale * torch.autograd.grad(log_p(classifier(x, t), y), x)[0]

        settings: dict[str, Any] = {
            "shape": self.x.shape, "noise": self.x.to(dtype), "cond_fn": cond_fn, "model_kwargs": {"y": self.labels},
            "device": "cpu",
        }  # fmt: skip

        def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            output: Tensor = network(x, t, y=y) if own_networks else network(x, t, y)
            return output

        # Their samplers draw from torch at every step: hand them ours.
        with mock.patch.object(torch, "randn_like", side_effect=list(self.noise.to(dtype))):
            if eta is None:
                return self.theirs.p_sample_loop(model, **settings)  # type: ignore[no-any-return]
            return self.theirs.ddim_sample_loop(model, eta=eta, **settings)  # type: ignore[no-any-return]

    def compare(self, table: Table) -> None:
        for (name, eta), scale in itertools.product(LOOPS.items(), SCALES):
            row, same = f"{name}, scale {scale:g}", f"{name}, scale {scale:g}, our networks"
            single, double = (self.our_loop(eta, scale, dtype) for dtype in (torch.float32, torch.float64))
            for which, own_networks in ((row, True), (same, False)):
                their = self.their_loop(eta, scale, torch.float32, own_networks=own_networks)
                table.row(which, "float32").note(apart=relative(single, their))
            with mock.patch.object(self.gaussian, "_extract_into_tensor", gather_float64):
                their = self.their_loop(eta, scale, torch.float64, own_networks=False)
            table.row(same, "float64").note(apart=relative(double, their))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--peer-path", type=Path, required=True, help="a checkout of openai/guided-diffusion")
    parser.add_argument("--published", action="store_true", help="networks of the published sizes as well (8 GB)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(load_reference(options.peer_path, "guided_diffusion"))
    for name, config in NETWORKS.items():
        compare_networks(table, name, config)
    for preset in PUBLISHED if options.published else ():
        model = load_config(find_preset(preset)).model
        assert isinstance(model, EncoderConfig)
        compare_networks(table, preset, model)
    for respacing in RESPACINGS:
        Guided(table, respacing).compare(table)
    print("\n".join([HEADER, *map(str, table.rows.values())]))
    if options.json is not None:
        write_json(options.json, {"rows": [asdict(row) for row in table.rows.values()]})
    return 0


if __name__ == "__main__":
    run_cli(main)
