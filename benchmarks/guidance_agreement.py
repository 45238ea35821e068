"""A step of guided sampling beside that of openai/guided-diffusion: the same network, classifier, x_t and time.

    python -m benchmarks.guidance_agreement --peer-path DIR      # DIR: a checkout of openai/guided-diffusion

For both schedules of the published code, with and without rescaled time, learned and fixed variances, two respacings
and two scales, at every visited step: the mean of algorithm 1, and mean and x_0 of algorithm 2. Largest distance in
float32, relative to the largest value. Networks are ours, with random weights: what is compared is what is done with
their output.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError, run_cli
from trainer.config.diffusion import DiffusionConfig
from trainer.config.model import ClassifierConfig, UNetConfig
from trainer.diffusion.classifier_guidance import classifier_score
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.predictor import LARGEST_GUIDED_SIGMA, Predictor
from trainer.models import build_model

T = 1000
SHAPE: dict[str, Any] = {
    "image_size": 16, "channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,),
    "num_heads": 2,
}  # fmt: skip
LABELS = torch.tensor([0, 1, 2, 3])


def random_network(model: Any, diffusion: DiffusionConfig, *, sharpen: float = 1.0) -> nn.Module:
    """A network none of whose weights is zero; `sharpen` multiplies a classifier's last layer."""
    torch.manual_seed(0)
    network = build_model(model, diffusion).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.add_(0.03 * torch.randn_like(parameter))
        parameter.mul_(sharpen if name.startswith("pool.proj") else 1.0)
    return network


def steps(peer: Any, schedule: Any, rescaled: bool, learned: bool, respacing: str, scale: float) -> Iterator[Any]:
    """(what, our tensor, theirs) of every step of one process."""
    variance: Any = "learned_range" if learned else "fixed_large"
    objective: Any = "hybrid" if learned else "simple"
    config = DiffusionConfig(
        num_timesteps=T, schedule=schedule, variance=variance, objective=objective, rescale_timesteps=rescaled
    )
    network = random_network(UNetConfig(**SHAPE), config)
    noisy = DiffusionConfig(num_timesteps=T, schedule=schedule, objective="cross_entropy", rescale_timesteps=rescaled)
    classifier = random_network(ClassifierConfig(**SHAPE, num_classes=4), noisy, sharpen=200.0)
    ours = GaussianDiffusion.create(config, "cpu", respacing)
    predictor = Predictor(network, ours, score=classifier_score(classifier, LABELS, scale=scale))
    gd, respace = peer
    theirs = respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(T, respacing), betas=gd.get_named_beta_schedule(schedule, T),
        model_mean_type=gd.ModelMeanType.EPSILON, loss_type=gd.LossType.MSE, rescale_timesteps=rescaled,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learned else gd.ModelVarType.FIXED_LARGE,
    )  # fmt: skip

    def gradient(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = F.log_softmax(classifier(x, time.float()), dim=-1)[range(len(y)), y]
            return torch.autograd.grad(chosen.sum(), x)[0] * scale

    x0, noise = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for step in range(ours.num_timesteps):
        t = torch.full((4,), step)
        x = ours.q_sample(x0.tanh(), t, noise)
        bare = theirs.p_mean_variance(lambda x, t, y: network(x, t.float()), x, t, model_kwargs={"y": LABELS})
        shifted = theirs.condition_mean(gradient, bare, x, t, model_kwargs={"y": LABELS})
        scored = theirs.condition_score(gradient, bare, x, t, model_kwargs={"y": LABELS})
        second = predictor(x, step)
        yield "algorithm 1, mean", predictor.with_shifted_mean(x, step).mean, shifted
        if ours.schedule.level(step).scaled_sigma <= LARGEST_GUIDED_SIGMA:  # above it ours leaves the score out
            yield "algorithm 2, mean", second.mean, scored["mean"]
            yield "algorithm 2, x_0", second.x0, scored["pred_xstart"]


def load_peer(path: Path) -> tuple[Any, Any]:
    """Their modules `gaussian_diffusion` and `respace`. Raises UserError for a folder without them."""
    if not (path / "guided_diffusion" / "respace.py").is_file():
        raise UserError(f"--peer-path {path}: no guided_diffusion/ there; clone openai/guided-diffusion and name that.")
    sys.path.insert(0, str(path))
    sys.modules.setdefault("mpi4py", types.ModuleType("mpi4py")).MPI = None  # type: ignore[attr-defined]
    names = ("guided_diffusion.gaussian_diffusion", "guided_diffusion.respace")
    return importlib.import_module(names[0]), importlib.import_module(names[1])


@torch.no_grad()
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-path", type=Path, required=True, help="a checkout of openai/guided-diffusion")
    peer = load_peer(parser.parse_args().peer_path)
    largest: dict[str, float] = {}
    counts: dict[str, int] = {}
    cases = itertools.product(("cosine", "linear"), (True, False), (True, False), ("25", "10,5,5"), (1.0, 10.0))
    for case in cases:
        for what, ours, theirs in steps(peer, *case):
            apart = float((ours - theirs).abs().max() / theirs.abs().max())
            largest[what], counts[what] = max(largest.get(what, 0.0), apart), counts.get(what, 0) + 1
    for what, apart in largest.items():
        print(f"{what}: {counts[what]} steps, at most {apart:.1e} apart")
    return 0


if __name__ == "__main__":
    run_cli(main)
