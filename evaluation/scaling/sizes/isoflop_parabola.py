"""Parabolas of the value in log size, for many weightings or values at once, and their bootstrap by run.

Many runs are resampled, whole; of few, every round turns over the residuals of some runs in all slices together (the
wild bootstrap by cluster, Cameron, Gelbach & Miller 2008), so that no slice loses a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.scaling.points import Array
from evaluation.scaling.sizes.distinct import distinct
from evaluation.scaling.sizes.isoflop_slices import Samples

MIN_RESAMPLED_RUNS = 20
MIN_RUNS = 8
_NEAR = float(np.log(5))  # a parabola is fitted to sizes within this of its minimum
_LEAST_SIZES = 5


@dataclass(frozen=True)
class Parabolas:
    """y = c0 + c1 x + c2 x^2 in x = (log N - middle) / width, one a row."""

    coefficients: Array  # [R, 3]
    middle: float
    width: float

    @property
    def log_size(self) -> Array:
        """Where the minimum is [R]; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(self.coefficients[:, 2] > 0, -self.coefficients[:, 1] / (2 * self.coefficients[:, 2]), np.nan)
        return self.middle + self.width * x

    def at(self, log_n: Array) -> Array:
        x = (log_n - self.middle) / self.width
        return np.asarray(self.coefficients @ np.stack([np.ones_like(x), x, x * x]))


def design_of(s: Samples) -> tuple[Array, float, float]:
    middle, width = float((s.log_n.min() + s.log_n.max()) / 2), float(np.ptp(s.log_n)) / 2
    x = (s.log_n - middle) / width
    return np.stack([np.ones_like(x), x, x * x], axis=1), middle, width


def base_weights(s: Samples) -> Array:
    return np.ones(len(s.value)) if s.stderr is None else 1 / s.stderr**2


def parabolas(s: Samples, values: Array, weights: Array) -> Parabolas:
    """Weighted least squares of values [R, n] or [n], by weights [R, n]; rows of too few sizes come out as NaN."""
    design, middle, width = design_of(s)
    normal = np.einsum("rn,ni,nj->rij", weights, design, design)
    moment = np.einsum("rn,ni->ri", weights * values, design)
    solvable = np.linalg.cond(normal) < 1e12
    normal[~solvable] = np.eye(3)
    coefficients = np.linalg.solve(normal, moment[:, :, None])[:, :, 0]
    coefficients[~solvable] = np.nan
    return Parabolas(coefficients, middle, width)


def near_minimum(s: Samples) -> NDArray[np.bool_]:
    """Which samples [n] to fit: the sizes within a factor of the minimum, five at least.

    Further off the value is no parabola, and its skew would shift the minimum by a tenth. All where there are no more
    than five sizes, or no minimum among them.
    """
    everything, sizes = np.ones(len(s.value), dtype=bool), distinct(s.log_n)
    if len(sizes) == 0 or sizes.max() < _LEAST_SIZES:
        return everything
    log_size = float(parabolas(s, s.value, base_weights(s)[None]).log_size[0])
    if not s.log_n.min() <= log_size <= s.log_n.max():
        return everything
    distance = np.abs(s.log_n - log_size)
    reach = np.sort([distance[sizes == k].max() for k in range(sizes.max() + 1)])[_LEAST_SIZES - 1]
    return np.asarray(distance <= max(_NEAR, reach))


def log_images(s: Samples, log_size: Array) -> Array:
    """log D at sizes, along the slice: a straight line of log D in log N."""
    slope, level = np.polyfit(s.log_n - s.log_n.mean(), s.log_d, 1)
    return np.asarray(level + slope * (log_size - s.log_n.mean()))


def minima_of(used: Sequence[Samples]) -> Array:
    """(log N*, log D*) of each slice: [slices, 2]."""
    sizes = [parabolas(s, s.value, base_weights(s)[None]).log_size for s in used]
    return np.array([(x[0], log_images(s, x)[0]) for s, x in zip(used, sizes, strict=True)])


def rounds_of(used: Sequence[Samples], num_runs: int, num_rounds: int, seed: int) -> tuple[Array, str]:
    """(log N*, log D*) of each slice in each round [R, slices, 2], NaN without a minimum inside; and any doubt."""
    nothing = np.empty((0, len(used), 2))
    if num_rounds <= 0 or num_runs < 2:
        return nothing, "no bootstrap." if num_rounds <= 0 else "one run: nothing says how runs differ."
    rng = np.random.default_rng(seed)
    resample = num_runs >= MIN_RESAMPLED_RUNS
    if not resample and all(len(s.value) == 3 for s in used):
        return nothing, "three points a slice leave no scatter to judge by."
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_rounds).astype(float)
    # Few runs know their own scatter badly: it is drawn too, as for Student's t.
    dof = max(1, num_runs - 3)
    signs = rng.choice([-1.0, 1.0], size=(num_rounds, num_runs))
    signs *= np.sqrt(dof / rng.chisquare(dof, (num_rounds, 1)))
    found = []
    for s in used:
        weights = np.tile(base_weights(s), (num_rounds, 1))
        values = np.tile(s.value, (num_rounds, 1))
        if resample:
            weights *= drawn[:, s.run]
        else:
            law = parabolas(s, s.value, weights[:1]).at(s.log_n)[0]
            values = law + signs[:, s.run] * (s.value - law) * np.sqrt(len(law) / max(1, len(law) - 3))
        log_size = parabolas(s, values, weights).log_size
        log_size[~((log_size >= s.log_n.min()) & (log_size <= s.log_n.max()))] = np.nan
        found.append(np.stack([log_size, log_images(s, log_size)], axis=1))
    doubt = f"{num_runs} runs are few: the intervals only hint at the uncertainty." if num_runs < MIN_RUNS else ""
    return np.stack(found, axis=1), doubt


def lines(x: Array, y: Array) -> Array:
    """(level at x = 0, slope) of the least-squares line through what is finite of each row of y [R, n]: [R, 2]."""
    there = np.isfinite(y).astype(float)
    filled = np.where(there > 0, y, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        count = there.sum(axis=1)
        mean_x, mean_y = there @ x / count, filled.sum(axis=1) / count
        dx = (x - mean_x[:, None]) * there
        slope = np.where(count >= 2, (dx * filled).sum(axis=1) / (dx * dx).sum(axis=1), np.nan)
    return np.stack([mean_y - slope * mean_x, slope], axis=1)
