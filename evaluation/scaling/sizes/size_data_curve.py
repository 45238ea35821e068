"""The curve L(N, D), and the map between points and the solver's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from evaluation.scaling.points import Array, Point
from evaluation.scaling.sizes.size_data_solver import A, B, E, P, Q


@dataclass(frozen=True)
class SizeDataCurve:
    """L(N, D) = E + A N^-alpha + B D^-beta. A and B are kept as logarithms: they may exceed any float."""

    E: float  # irreducible
    log_A: float
    alpha: float
    log_B: float
    beta: float

    def __call__(self, num_params: ArrayLike, images: ArrayLike) -> Array:
        """The value at N and D, arrays of any shapes that broadcast."""
        log_n, log_d = np.log(np.asarray(num_params, dtype=float)), np.log(np.asarray(images, dtype=float))
        return np.asarray(self.E + np.exp(self.log_A - self.alpha * log_n) + np.exp(self.log_B - self.beta * log_d))

    @property
    def A(self) -> float:
        return float(np.exp(self.log_A))

    @property
    def B(self) -> float:
        return float(np.exp(self.log_B))

    @property
    def size_exponent(self) -> float:
        """a in N* ~ C^a where compute is proportional to N D: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def data_exponent(self) -> float:
        """b in D* ~ C^b where compute is proportional to N D: alpha / (alpha + beta)."""
        return self.alpha / (self.alpha + self.beta)

    def to_json(self) -> dict[str, Any]:
        return {
            "E": self.E, "A": self.A, "alpha": self.alpha, "B": self.B, "beta": self.beta, "log_A": self.log_A,
            "log_B": self.log_B, "size_exponent": self.size_exponent, "data_exponent": self.data_exponent,
        }  # fmt: skip


@dataclass(frozen=True)
class Scales:
    """Points in the solver's units, and how to come back from them."""

    log_n: Array  # [n]
    log_d: Array  # [n]
    log_y: Array  # [n] over the geometric mean
    log_unit: float  # log of the geometric mean value

    @property
    def u(self) -> Array:
        return np.asarray((self.log_n - self.log_n.min()) / np.ptp(self.log_n))

    @property
    def v(self) -> Array:
        return np.asarray((self.log_d - self.log_d.min()) / np.ptp(self.log_d))

    def parameters(self, theta: Array) -> Array:
        """(E, log A, alpha, log B, beta) [R, 5] of the solver's parameters [R, 5]."""
        alpha, beta = theta[:, P] / np.ptp(self.log_n), theta[:, Q] / np.ptp(self.log_d)
        with np.errstate(divide="ignore"):
            log_a = np.log(theta[:, A]) + self.log_unit + alpha * self.log_n.min()
            log_b = np.log(theta[:, B]) + self.log_unit + beta * self.log_d.min()
        return np.stack([theta[:, E] * np.exp(self.log_unit), log_a, alpha, log_b, beta], axis=1)

    def curve(self, theta: Array) -> SizeDataCurve:
        return SizeDataCurve(*(float(x) for x in self.parameters(theta[None])[0]))


def scales_of(points: Sequence[Point]) -> Scales:
    """The scales of points with positive sizes, images and values."""
    log_y = np.log([p.value for p in points])
    unit = float(log_y.mean())
    return Scales(np.log([p.num_params for p in points]), np.log([p.images for p in points]), log_y - unit, unit)
