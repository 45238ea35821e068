"""The published trend lines of Nichol & Dhariwal 2021, to lay over a study's figure. They are never fitted.

    FID = 4.00 + (2.5e-25 C)^-0.22        NLL = 3.40 + (3.0e-15 C)^-0.17 bits/dim        (ImageNet-64, unconditional)

The paper calls C FLOPs. Its own tables lie on these lines only if C counts 3 x multiply-adds x images, which is half
of this project's FLOPs (2 per multiply-add, training = 3 x forward); tests/evaluation/test_paper.py holds the two
readings side by side. So here C = FLOPs / 2, and every label says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from evaluation.scaling.fitting.forms import Curve
from trainer.tracking.records import FLOP_CONVENTION

SOURCE = "Nichol & Dhariwal 2021, ImageNet-64"
CONVENTION = "their C counts multiply-adds, here ×2"
FLOPS_PER_MULTIPLY_ADD = 2

# Forward multiply-adds of the 120M network of the paper's Tables 1 and 2 (128 channels, 3 residual blocks), its batch.
_MULTIPLY_ADDS, _BATCH = 39.74e9, 128


@dataclass(frozen=True)
class PublishedPoint:
    """A number of a published table."""

    name: str
    compute: float  # FLOPs, 2 per multiply-add
    value: float


@dataclass(frozen=True)
class PublishedLaw:
    """A law that others have published, over compute in FLOPs (2 per multiply-add)."""

    metric: str
    curve: Curve
    points: tuple[PublishedPoint, ...]  # by compute
    source: str = SOURCE
    convention: str = CONVENTION
    flop_convention: str = FLOP_CONVENTION  # of `curve` and `points`

    @property
    def label(self) -> str:
        return f"{self.source} ({self.convention})"

    @property
    def range_compute(self) -> tuple[float, float]:
        """Between the published points; elsewhere the line is extrapolated."""
        return self.points[0].compute, self.points[-1].compute


def published(metric: str) -> tuple[PublishedLaw, ...]:
    """The published laws of a metric: of `nll` (bits/dim) and of `fid` (Inception-v3), and of nothing else.

    Fréchet distances in other features (`fd_efflite0`) are on another scale: no line is right for them.
    """
    return tuple(law for law in _LAWS if law.metric == metric.lower())


def trend(constant: float, coefficient: float, exponent: float) -> Curve:
    """y = constant + (coefficient C)^-exponent, with C in the paper's count."""
    return Curve(exponent, constant, amplitude=1.0, reference_compute=1 / coefficient)


def in_flops(curve: Curve) -> Curve:
    """The same law over FLOPs, where the curve's own compute counts multiply-adds."""
    return dataclasses.replace(curve, reference_compute=FLOPS_PER_MULTIPLY_ADD * curve.reference_compute)


def _point(iterations: int, value: float) -> PublishedPoint:
    """A network of the tables' size: L_hybrid, cosine schedule, T = 4000."""
    compute = 3 * FLOPS_PER_MULTIPLY_ADD * _MULTIPLY_ADDS * _BATCH * iterations
    return PublishedPoint(f"120M parameters, L_hybrid, {iterations:,} iterations", compute, value)


PAPER_NLL = trend(3.40, 3.0e-15, 0.17)
PAPER_FID = trend(4.00, 2.5e-25, 0.22)
_LAWS = (
    PublishedLaw("nll", in_flops(PAPER_NLL), (_point(200_000, 3.62), _point(1_500_000, 3.57))),
    PublishedLaw("fid", in_flops(PAPER_FID), (_point(200_000, 28.0), _point(1_500_000, 19.2))),
)
