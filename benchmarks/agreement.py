"""Our process, losses, samplers and networks against the published code: `python -m benchmarks.agreement`.

`--peer-path` names a checkout of openai/improved-diffusion (the code of Nichol & Dhariwal 2021). Both compute the same
quantities from the same inputs and noise. The table gives the largest differences, of ours and theirs to each other and
of each to the truth: ours in float64, or an integral. They are relative to an image's largest value; bits/dim below 1
and losses below 0.001 count as these. The reference gathers its tables in float32; for float64 that is replaced.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import improved_diffusion_unet
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from trainer.config.diffusion import DiffusionConfig, Variance
from trainer.config.model import UNetConfig
from trainer.diffusion.gaussian import Denoiser, GaussianDiffusion
from trainer.diffusion.likelihoods import HALF_BIN, LAST_BIN, discretized_log_likelihood
from trainer.diffusion.objectives import training_losses
from trainer.diffusion.predictor import Predictor
from trainer.diffusion.samplers import SAMPLERS
from trainer.diffusion.thresholding import static
from trainer.interop.improved_diffusion import pairs
from trainer.models import IMAGE_CHANNELS
from trainer.models.unet import UNet

MEANS = {"eps": "EPSILON", "x0": "START_X", "previous_mean": "PREVIOUS_X"}  # ours: theirs
LOSSES = {  # objective, vlb_weight, theirs; for t > 0
    "loss: simple": ("simple", "rescaled", "MSE"),
    "loss: hybrid, unrescaled": ("hybrid", "unrescaled", "MSE"),
    "loss: hybrid, rescaled": ("hybrid", "rescaled", "RESCALED_MSE"),
    "loss: vlb [bits/dim]": ("vlb", "rescaled", "RESCALED_KL"),
}
SAME_TABLES = ("timestep_map", "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod")
TABLES = {name: name for name in (*SAME_TABLES, "sqrt_one_minus_alphas_cumprod")} | {
    "posterior_mean_x0": "posterior_mean_coef1",
    "posterior_mean_xt": "posterior_mean_coef2",
    "posterior_log_variance": "posterior_log_variance_clipped",
}
CIFAR10: dict[str, Any] = {"image_size": 32, "channel_mult": (1, 2, 2, 2)}
SMALL = UNetConfig(**CIFAR10, channels=32, num_res_blocks=1)
NETWORKS = {
    "CIFAR-10, C=32": SMALL,
    "CIFAR-10, C=64": UNetConfig(**CIFAR10, channels=64, num_res_blocks=3),
    "ImageNet-64, C=128": UNetConfig(image_size=64, channels=128, channel_mult=(1, 2, 3, 4), num_res_blocks=3),
    "one head, no scale-shift": UNetConfig(
        image_size=64, channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=2, num_heads=1,
        attention_resolutions=(16,), use_scale_shift_norm=False,
    ),
    "upsampler with classes": UNetConfig(
        image_size=64, channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1, num_classes=5, low_res_size=16
    ),
}  # fmt: skip
LOOPS: dict[str, float | None] = {"ancestral": None, "ddim, eta 0": 0.0, "ddim, eta 0.5": 0.5, "ddim, eta 1": 1.0}
SPREAD = 0.5  # standard deviation of the pixels that `ideal_denoiser` knows
MAX_LOOP = 100  # steps of the sampling loops without a network

Quantities = dict[str, Tensor]


class Inputs(NamedTuple):
    """What a process is asked about: images and network output at some timesteps."""

    x0: Tensor  # [B, C, H, W], as are noise and x_t
    noise: Tensor
    x_t: Tensor
    output: Tensor  # [B, C or 2C, H, W]
    t: Tensor  # [B], ascending from 0


class LoopInputs(NamedTuple):
    """What a sampling loop starts from and draws."""

    x: Tensor  # [B, C, H, W]
    noise: Tensor  # [T, B, C, H, W]


AnyInputs = TypeVar("AnyInputs", Inputs, LoopInputs)


def cast(inputs: AnyInputs, dtype: torch.dtype) -> AnyInputs:
    return type(inputs)(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))


@dataclass
class Row:
    """A quantity's largest differences in one precision."""

    quantity: str
    precision: str
    apart: float | None = None  # ours to theirs
    ours: float | None = None  # to the truth
    theirs: float | None = None

    def note(self, **differences: float) -> None:
        for name, difference in differences.items():
            setattr(self, name, float(np.maximum(difference, getattr(self, name) or 0.0)))  # keeps NaN

    def __str__(self) -> str:
        columns = ("" if x is None else f"{x:.1e}" for x in (self.apart, self.ours, self.theirs))
        return f"{self.quantity:42}{self.precision:10}" + "".join(f"{column:>12}" for column in columns)


HEADER = f"{'':42}{'precision':10}{'apart':>12}{'ours':>12}{'theirs':>12}"


def load_reference(path: Path, package: str = "improved_diffusion") -> Any:
    """The package of a checkout of OpenAI's code.

    Raises UserError when `path` is not one.
    """
    if not (path / package / "gaussian_diffusion.py").exists():
        name = package.replace("_", "-")
        raise UserError(
            f"--peer-path {path} is no checkout of {name} (no {package}/gaussian_diffusion.py); "
            f"make one with: git clone https://github.com/openai/{name}"
        )
    sys.path.append(str(path))
    for name in ("respace", "unet"):  # these import the others
        importlib.import_module(f"{package}.{name}")
    return sys.modules[package]


@dataclass
class Table:
    """The differences found so far."""

    reference: Any
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def row(self, quantity: str, precision: str) -> Row:
        return self.rows.setdefault((quantity, precision), Row(quantity, precision))

    def compare(
        self,
        ours: Callable[[AnyInputs], Quantities],
        theirs: Callable[[AnyInputs], Quantities],
        double: AnyInputs,
        single: AnyInputs,
    ) -> None:
        """Evaluate both in both precisions, and the truth of the float32 inputs."""
        exact, own, their = ours(double), ours(single), theirs(single)
        with mock.patch.object(self.reference.gaussian_diffusion, "_extract_into_tensor", gather_float64):
            their_exact = theirs(double)
        for name, truth in ours(cast(single, torch.float64)).items():
            least = 1.0 if "bits/dim" in name else 1e-3 if "loss" in name else 0.0
            difference = partial(relative, at_least=least)
            self.row(name, "float64").note(apart=difference(their_exact[name], exact[name]))
            self.row(name, "float32").note(
                apart=difference(their[name], own[name]),
                ours=difference(own[name], truth),
                theirs=difference(their[name], truth),
            )


def gather_float64(table: np.ndarray, t: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(table)[t].view(-1, *[1] * (len(shape) - 1)).expand(shape)


def relative(value: Tensor, truth: Tensor, *, at_least: float = 0.0) -> float:
    """Largest over the batch: an image's largest difference, relative to its largest true entry, or to `at_least`."""
    difference, size = ((x.double().abs().reshape(len(x), -1).amax(dim=1)) for x in (value.double() - truth, truth))
    return float((difference / size.clamp(min=at_least)).max())


# The process


class Case(NamedTuple):
    """A process and how a network's output is read."""

    schedule: str
    num_timesteps: int
    respacing: str | None
    prediction: Any
    variance: Any

    def config(self, **settings: Any) -> DiffusionConfig:
        names = ("schedule", "num_timesteps", "prediction", "variance")
        return DiffusionConfig(**{name: getattr(self, name) for name in names} | {"objective": "vlb"} | settings)

    def ours(self) -> GaussianDiffusion:
        return GaussianDiffusion.create(self.config(), respacing=self.respacing)

    def theirs(self, reference: Any) -> Any:
        process = reference.gaussian_diffusion
        settings: dict[str, Any] = {
            "betas": process.get_named_beta_schedule(self.schedule, self.num_timesteps),
            "model_mean_type": process.ModelMeanType[MEANS[self.prediction]],
            "model_var_type": process.ModelVarType[self.variance.upper()],
            "loss_type": process.LossType.MSE,
            "rescale_timesteps": True,
        }
        if self.respacing is None:
            return process.GaussianDiffusion(**settings)
        steps = reference.respace.space_timesteps(self.num_timesteps, self.respacing)
        return reference.respace.SpacedDiffusion(use_timesteps=steps, **settings)


def cases() -> Iterator[Case]:
    """Respaced processes only with readings that do not depend on the process that a network was trained on."""
    respacings = (None, "50", "ddim25", "10,15,20")
    for schedule, steps, respacing in itertools.product(("linear", "cosine"), (100, 1000, 4000), respacings):
        for prediction, variance in itertools.product(MEANS, get_args(Variance)):
            if respacing is None or (prediction != "previous_mean" and variance != "learned"):
                yield Case(schedule, steps, respacing, prediction, variance)


def make_inputs(process: GaussianDiffusion, dtype: torch.dtype) -> Inputs:
    """Random images, and the output of a plausible network: its x_0 is off by a tenth of what x_t leaves open."""
    torch.manual_seed(0)
    n = process.num_timesteps
    t = torch.tensor(sorted({0, 1, 2, n // 4, n // 2, 3 * n // 4, n - 2, n - 1}))
    x0 = torch.randint(0, 256, (len(t), IMAGE_CHANNELS, 8, 8)).double() / 127.5 - 1
    noise, error = torch.randn_like(x0), 0.1 * torch.randn_like(x0)
    x0, noise = x0.to(dtype), noise.to(dtype)
    x_t = process.q_sample(x0, t, noise)
    alpha, sigma = process.signal_and_noise(t, error)
    error = error * (sigma / alpha).clamp(max=0.3)
    value = process.quantity(process.prediction, x0 + error, noise - alpha / sigma * error, x_t.double(), t)
    output = with_variance(process, value, t, 0.5 * torch.randn_like(x0, dtype=torch.float64))
    return Inputs(x0, noise, x_t, output.to(dtype), t)


def with_variance(process: GaussianDiffusion, value: Tensor, t: Tensor, around: Tensor) -> Tensor:
    """A network's output: the quantity, and where the variance is learned one `around` the middle of its range."""
    if process.variance == "learned_range":
        return torch.cat([value, around], dim=1)
    if process.variance == "learned":
        s = process.schedule
        return torch.cat([value, s.gather(s.posterior_log_variance, t, value) + 0.2 * around], dim=1)
    return value


def our_reading(process: GaussianDiffusion, clip: bool, x: Inputs) -> Quantities:
    read = process.predict(x.output, x.x_t, x.t, threshold=static if clip else None)
    terms = process.vb_terms(read, x.x0, x.x_t, x.t)
    return named_reading(read.x0, read.mean, read.log_variance, process.num_timesteps, terms, process.prior_bits(x.x0))


def their_reading(process: Any, clip: bool, x: Inputs) -> Quantities:
    model = mock.Mock(return_value=x.output)
    read = process.p_mean_variance(model, x.x_t, x.t, clip_denoised=clip)
    terms = process._vb_terms_bpd(model, x.x0, x.x_t, x.t, clip_denoised=clip)["output"]
    steps, prior = process.num_timesteps, process._prior_bpd(x.x0)
    return named_reading(read["pred_xstart"], read["mean"], read["log_variance"], steps, terms, prior)


def named_reading(x0: Tensor, mean: Tensor, log_variance: Tensor, n: int, terms: Tensor, prior: Tensor) -> Quantities:
    return {
        "predicted x_0": x0,
        "mean of p(x_{t-1} | x_t)": mean,
        "log variance of p(x_{t-1} | x_t)": log_variance,
        "T L_t for t > 0 [bits/dim]": n * terms[1:],
        "L_0 [bits/dim]": terms[:1],
        "prior [bits/dim]": prior,
    }


def our_loss(process: GaussianDiffusion, config: DiffusionConfig, name: str, x: Inputs) -> Quantities:
    losses = training_losses(process, config, x.output, x0=x.x0, x_t=x.x_t, t=x.t, noise=x.noise)
    return {name: losses.loss[1:]}


def their_loss(process: Any, name: str, x: Inputs) -> Quantities:
    losses = process.training_losses(mock.Mock(return_value=x.output), x.x0, x.t, noise=x.noise)
    return {name: losses["loss"][1:]}


def compare_process(table: Table, case: Case) -> None:
    """Schedule tables and readings."""
    ours, theirs = case.ours(), case.theirs(table.reference)
    for our_name, their_name in TABLES.items():
        if hasattr(theirs, their_name):  # only a respaced process has a timestep map
            difference = getattr(ours.schedule, our_name) - torch.as_tensor(getattr(theirs, their_name))
            table.row("schedule tables, absolute", "float64").note(apart=float(difference.abs().max()))
    double, single = make_inputs(ours, torch.float64), make_inputs(ours, torch.float32)
    for clip in (False, True):
        table.compare(partial(our_reading, ours, clip), partial(their_reading, theirs, clip), double, single)


def compare_losses(table: Table, case: Case) -> int:
    """Those that suit the case; returns their number."""
    ours, theirs = case.ours(), case.theirs(table.reference)
    double, single = make_inputs(ours, torch.float64), make_inputs(ours, torch.float32)
    unsuitable = "simple" if case.config().learns_variance else "hybrid"
    suitable = {name: loss for name, loss in LOSSES.items() if loss[0] != unsuitable}
    for name, (objective, weight, their_type) in suitable.items():
        config = case.config(objective=objective, vlb_weight=weight)
        theirs.loss_type = table.reference.gaussian_diffusion.LossType[their_type]
        table.compare(partial(our_loss, ours, config, name), partial(their_loss, theirs, name), double, single)
    return len(suitable)


def compare_decoder(table: Table) -> None:
    """The mass of a Gaussian in an 8-bit bin, against Gauss-Legendre integration of its density."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (50_000,)).double() / 127.5 - 1
    log_scale = torch.empty_like(x).uniform_(-6, 1)
    mean = x + 2 * log_scale.exp() * torch.randn_like(x)
    low = torch.where(x < -LAST_BIN, -torch.inf, x - HALF_BIN)
    high = torch.where(x > LAST_BIN, torch.inf, x + HALF_BIN)
    low, high = (((edge - mean) / log_scale.exp()).clamp(-9, 9) for edge in (low, high))  # 1e-19 lies beyond 9 sigma
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(100))
    places = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * nodes
    mass = (high - low) / 2 * (torch.distributions.Normal(0.0, 1.0).log_prob(places).exp() @ weights)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        at, around, scale = x.to(dtype), mean.to(dtype), log_scale.to(dtype)
        theirs = table.reference.losses.discretized_gaussian_log_likelihood(at, means=around, log_scales=scale)
        ours = discretized_log_likelihood(at, around, scale)
        own, their = (float((x.double().exp() - mass).abs().max()) for x in (ours, theirs))
        table.row("mass of an 8-bit bin, absolute", name).note(ours=own, theirs=their)


# Sampling loops and networks


def ideal_denoiser(whole: GaussianDiffusion) -> Denoiser:
    """The best network for pixels ~ N(0, SPREAD²): loops through it are as well-behaved as those of a trained one."""

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        x_t, t = x.double(), (time.double() * whole.num_timesteps / 1000).round().long()
        alpha, sigma = whole.signal_and_noise(t, x_t)
        x0 = alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2) * x_t
        value = whole.quantity(whole.prediction, x0, (x_t - alpha * x0) / sigma, x_t, t)
        return with_variance(whole, value, t, 0.2 * x_t.tanh()).to(x.dtype)

    return denoiser


def our_loop(denoiser: Denoiser, process: GaussianDiffusion, name: str, inputs: LoopInputs) -> Quantities:
    noise = iter(inputs.noise).__next__
    eta, predictor = LOOPS[name], Predictor(denoiser, process)
    if eta is None:
        return {name: SAMPLERS["ancestral"](predictor, inputs.x, noise=noise)}
    return {name: SAMPLERS["ddim"](predictor, inputs.x, noise=noise, eta=eta)}


def their_loop(denoiser: Denoiser, process: Any, name: str, inputs: LoopInputs) -> Quantities:
    """Their samplers draw from torch at every step: hand them ours."""
    settings: dict[str, Any] = {"shape": inputs.x.shape, "noise": inputs.x, "device": "cpu"}
    eta = LOOPS[name]
    with torch.no_grad(), mock.patch.object(torch, "randn_like", side_effect=list(inputs.noise)):
        if eta is None:
            return {name: process.p_sample_loop(denoiser, **settings)}
        return {name: process.ddim_sample_loop(denoiser, eta=eta, **settings)}


def loop_inputs(process: GaussianDiffusion, image_size: int) -> LoopInputs:
    torch.manual_seed(0)
    shape = (2, IMAGE_CHANNELS, image_size, image_size)
    return LoopInputs(torch.randn(shape), torch.randn(process.num_timesteps, *shape))


def compare_loops(table: Table, case: Case) -> None:
    """Whole sampling loops through the ideal denoiser."""
    ours, theirs = case.ours(), case.theirs(table.reference)
    denoiser, single = ideal_denoiser(case._replace(respacing=None).ours()), loop_inputs(ours, image_size=8)
    for name in LOOPS:
        loops = partial(our_loop, denoiser, ours, name), partial(their_loop, denoiser, theirs, name)
        table.compare(*loops, cast(single, torch.float64), single)


def networks(reference: Any, model: UNetConfig, path: Path) -> tuple[UNet, nn.Module]:
    """Our network and theirs, with the same weights, none of them zero."""
    torch.manual_seed(0)
    ours = UNet(model, out_channels=2 * IMAGE_CHANNELS)
    weights = {name: (p + 0.03 * torch.randn_like(p)).detach() for name, p in ours.named_parameters()}
    ours.load_state_dict(weights)
    if model.low_res_size:
        theirs = reference.unet.SuperResModel(
            IMAGE_CHANNELS, model.channels, 2 * IMAGE_CHANNELS, model.num_res_blocks,
            tuple(model.image_size // size for size in model.attention_resolutions), channel_mult=model.channel_mult,
            num_classes=model.num_classes, num_heads=model.num_heads, use_scale_shift_norm=model.use_scale_shift_norm,
        )  # fmt: skip
    else:
        theirs = improved_diffusion_unet(model, out_channels=2 * IMAGE_CHANNELS, path=path)
    theirs.load_state_dict({pair.theirs: weights[pair.ours].reshape(pair.shape) for pair in pairs(ours)})
    return ours, theirs


def compare_networks(table: Table, name: str, model: UNetConfig, path: Path) -> None:
    """Forward pass and gradients of all parameters, each as one vector: distance over length."""
    ours, theirs = networks(table.reference, model, path)
    x, t = torch.randn(2, IMAGE_CHANNELS, model.image_size, model.image_size), 1000 * torch.rand(2)
    conditions: dict[str, Tensor] = {}
    if model.low_res_size:
        low_res = torch.randn(2, IMAGE_CHANNELS, model.low_res_size, model.low_res_size)
        conditions = {"y": torch.randint(model.num_classes, (2,)), "low_res": low_res}
    own, their = ours(x, t, *conditions.values()), theirs(x, t, **conditions)
    along = torch.randn_like(own)
    names = list(pairs(ours))
    parameters = [ours.get_parameter(pair.ours) for pair in names], [theirs.get_parameter(p.theirs) for p in names]
    our_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(own, parameters[0], along)])
    their_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(their, parameters[1], along)])
    for part, a, b in (("forward", own, their), ("gradients", our_gradients, their_gradients)):
        table.row(f"{name}: {part}", "float32").note(apart=float(((a - b).norm() / b.norm()).detach()))


def compare_network_loops(table: Table, path: Path) -> None:
    """Whole sampling loops through a network."""
    ours, theirs = (network.eval() for network in networks(table.reference, SMALL, path))
    for respacing in ("50", "ddim25", "10,5,5"):
        case = Case("cosine", 1000, respacing, "eps", "learned_range")
        process, inputs = case.ours(), loop_inputs(case.ours(), SMALL.image_size)
        for name in LOOPS:
            own = our_loop(ours, process, name, inputs)[name]
            their = their_loop(theirs, case.theirs(table.reference), name, inputs)[name]
            table.row(f"{name}: samples of CIFAR-10, C=32", "float32").note(apart=relative(own, their))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--peer-path", type=Path, required=True, help="a checkout of openai/improved-diffusion")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(load_reference(options.peer_path))
    todo = list(cases())
    for case in todo:
        compare_process(table, case)
    num_losses = sum(compare_losses(table, case) for case in todo if case.respacing is None)
    compare_decoder(table)
    loops = [case for case in todo if case.ours().num_timesteps <= MAX_LOOP]
    for case in loops:
        compare_loops(table, case)
    for name, model in NETWORKS.items():
        compare_networks(table, name, model, options.peer_path)
    compare_network_loops(table, options.peer_path)
    print(f"{len(todo)} processes and readings, {num_losses} losses, {len(loops) * len(LOOPS)} sampling loops")
    print("\n".join([HEADER, *map(str, table.rows.values())]))
    if options.json is not None:
        write_json(options.json, {"rows": [asdict(row) for row in table.rows.values()]})
    return 0


if __name__ == "__main__":
    run_cli(main)
