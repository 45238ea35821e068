"""The forms a law of compute may have, their curves and parameters.

power            y = a C^-b               (straight in log-log; with a known constant V: y - V = a C^-b)
power_constant   y = c + a C^-b           (c: the irreducible part, 0 <= c < min y); the paper writes c + (k C)^-b
broken           y = c + a C^-b0 (1 + (C/d)^(1/f))^(-(b1-b0) f)    (Caballero et al. 2022: one smooth break at d)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from evaluation.scaling.fitting.broken import BrokenCurve
from evaluation.scaling.points import Array

Form = Literal["power", "power_constant", "broken"]
FORMS: tuple[Form, ...] = get_args(Form)
FORMULAS: dict[Form, str] = {"power": "a C^-b", "power_constant": "c + a C^-b", "broken": "c + broken power of C"}
NUM_PARAMETERS: dict[Form, int] = {"power": 2, "power_constant": 3, "broken": 6}
# Two degrees of freedom are the least from which a scatter can be judged.
MIN_POINTS: dict[Form, int] = {form: num + 2 for form, num in NUM_PARAMETERS.items()}
# Points of nearly equal compute give any exponent at all: they must span a factor of two.
MIN_LOG_SPAN = float(np.log(2))


@dataclass(frozen=True)
class Curve:
    """y(C) = constant + amplitude * (C / reference_compute)^-exponent."""

    exponent: float
    constant: float
    amplitude: float  # y - constant at the reference compute
    reference_compute: float  # geometric mean of the fitted computes

    def __call__(self, compute: ArrayLike) -> Array:
        ratio = np.asarray(compute, dtype=np.float64) / self.reference_compute
        return np.asarray(self.constant + self.amplitude * ratio**-self.exponent)

    @property
    def log10_coefficient(self) -> float:
        """log10 of a in y = c + a C^-b."""
        return float(np.log10(self.amplitude) + self.exponent * np.log10(self.reference_compute))

    @property
    def log10_k(self) -> float:
        """log10 of k in y = c + (k C)^-b, as Nichol & Dhariwal 2021 write their trend lines."""
        return -self.log10_coefficient / self.exponent


AnyCurve: TypeAlias = Curve | BrokenCurve


def parameters(curve: AnyCurve) -> dict[str, float]:
    """The curve's numbers by name, those that follow from them included."""
    own = {name: float(value) for name, value in asdict(curve).items()}
    logs = {"log10_coefficient": curve.log10_coefficient}
    if isinstance(curve, Curve):
        logs["log10_k"] = curve.log10_k
    plain = {name.removeprefix("log10_"): 10.0**log for name, log in logs.items() if abs(log) < _MAX_LOG10}
    return own | logs | plain


_MAX_LOG10 = 300.0  # beyond, a coefficient is no floating-point number


@dataclass(frozen=True)
class Scale:
    """The map between compute and the solvers' t in [0, 1]."""

    log_min: float
    span: float

    def t(self, compute: ArrayLike) -> Array:
        return np.asarray((np.log(np.asarray(compute, dtype=np.float64)) - self.log_min) / self.span)


def scale_of(compute: Array) -> Scale:
    """The scale that maps these computes onto [0, 1]."""
    logs = np.log(compute)
    return Scale(float(logs.min()), float(logs.max() - logs.min()))


def base_weights(y: Array, stderr: Array | None, form: Form, constant: float = 0.0) -> Array:
    """Weight of each value, [n] or [R, n], in the form's objective, with standard errors [n] or without."""
    if form == "power":
        return np.ones(y.shape) if stderr is None else np.asarray(((y - constant) / stderr) ** 2)
    return 1 / y**2 if stderr is None else np.broadcast_to(1 / stderr**2, y.shape)
