"""The mean of a plan's calls and how sure it is: as an estimate of the mean over the split's images.

A call's value is y = weight * L_t + L_T, whose expectation over t and noise is f_i, the bound of its image i. Wanted
is the mean of f over the split's N images, whose variance (N - 1 in the denominator) is S^2. With m_ri of the n_r
calls of replicate r on image i, and m_i of all n, the images being in random order,

    value of a replicate    y_r = sum_i (m_ri / n_r) f_i + e_r,     e_r: time and noise, independent between replicates
    variance of the mean    S^2 sum_i (m_i / n - 1 / N)^2  +  Var(e) / R
    sample variance s^2     S^2 sum_r sum_i (m_ri / n_r - m_i / n)^2 / (R - 1)  +  Var(e)     (in expectation)

since Cov(f_i, f_j) = S^2 (1[i = j] - 1 / N) and all differences of shares add up to 0. S^2 itself is the mean product
of two residuals of the same image in two replicates, less that of two images in two replicates. The first line's 1 / N
is the finite-population correction: images that are all looked at equally often bring no error.

s^2 may be that within families of F neighbouring replicates, with R - R / F degrees of freedom: neighbours have images
in common, so that less of it is the images'. Intervals are Student's t, with as many degrees of freedom as the variance
of the standard error's square says (Satterthwaite 1946): those of s^2 where images have no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation.nll.plan import Plan

# What is left of s^2 without the images' share is no less than this part of it, and has this part of its degrees of
# freedom at least. In simulations, with an images' variance from a quarter of a call's other variance to four times
# it, 95 % intervals then cover 93 % or more; above 98 % only where there are one to two calls an image and images
# differ much. Without the first bound, standard errors of almost 0 come up there.
LEAST_SHARE = 0.2
LEAST_FREEDOM = 1 / 3


@dataclass(frozen=True)
class Mean:
    """An estimate of the split's mean, in bits/dim. None: what the calls cannot tell."""

    value: float
    stderr: float | None
    stderr_time_noise: float | None  # what other timesteps and noises on the same images would change
    stderr_images: float | None  # what other images of the split would change
    stderr_population: float | None  # stderr, if the split's images are themselves a sample of what is asked about
    num_replicates: int
    freedom: float  # degrees of freedom of the standard error

    @property
    def interval95(self) -> tuple[float, float] | None:
        """Student's t."""
        if self.stderr is None:
            return None
        reach = float(stats.t.ppf(0.975, self.freedom)) * self.stderr
        return self.value - reach, self.value + reach


def sampled_mean(values: NDArray[np.float64], plan: Plan, num_images: int) -> Mean:
    """The mean of the calls' values [num_calls] of a sampled plan; `num_images`: of the split."""
    replicates = plan.num_replicates
    _, image = np.unique(plan.image, return_inverse=True)
    seen = int(image.max()) + 1
    cell, shape = plan.replicate * seen + image, (replicates, seen)
    mean = float(values.mean())
    visits = np.bincount(cell, minlength=replicates * seen).reshape(shape)  # m_ri
    sums = np.bincount(cell, values - mean, minlength=replicates * seen).astype(np.float64).reshape(shape)
    per_replicate = visits.sum(axis=1, keepdims=True)  # all equal
    shares, share = visits / per_replicate, visits.sum(axis=0) / len(values)
    family, within, freedom = _families(shares, len(values))
    spread = _spread(sums.sum(axis=1, keepdims=True) / per_replicate, family) / freedom  # s^2
    unequal = float(np.square(share - 1 / num_images).sum() + (num_images - seen) / num_images**2)
    image_variance, its_variance = _image_variance(sums, visits, float(values.var()))
    time_noise = max(LEAST_SHARE * spread, spread - image_variance * within) / replicates
    images = image_variance * unequal
    variance = time_noise + images
    on_spread, on_images = spread / replicates, unequal - within / replicates
    uncertainty = 2 * on_spread**2 / freedom + on_images**2 * its_variance
    return Mean(
        value=mean,
        stderr=float(np.sqrt(variance)),
        stderr_time_noise=float(np.sqrt(time_noise)),
        stderr_images=float(np.sqrt(images)),
        stderr_population=float(np.sqrt(time_noise + image_variance * np.square(share).sum())),
        num_replicates=replicates,
        freedom=max(LEAST_FREEDOM * freedom, 2 * variance**2 / uncertainty) if uncertainty else float(freedom),
    )


def _families(shares: NDArray[np.float64], num_calls: int) -> tuple[int, float, int]:
    """How many replicates are compared with each other, the weight of S^2 in their s^2, and its degrees of freedom.

    From each replicate's shares of images [R, images]: families in which images differ least while degrees of freedom
    are kept, as if a call's variance were half the images'. The plan alone decides.
    """
    replicates = len(shares)
    sizes = [2**k for k in range(1, replicates.bit_length())]
    freedom = {size: replicates - replicates // size for size in sizes}
    within = {size: _spread(shares, size) / freedom[size] for size in sizes}
    best = min(sizes, key=lambda size: (replicates / num_calls + within[size]) ** 2 / freedom[size])
    return best, within[best], freedom[best]


def _spread(x: NDArray[np.float64], family: int) -> float:
    """Sum of squares around the means of families of so many neighbours, [R, columns]."""
    grouped = x.reshape(-1, family, x.shape[1])
    return float(np.square(grouped - grouped.mean(axis=1, keepdims=True)).sum())


def _image_variance(
    sums: NDArray[np.float64], visits: NDArray[np.int64], call_variance: float
) -> tuple[float, float]:  # fmt: skip
    """S^2, at least 0, and the variance of that estimate.

    From residual sums and numbers of visits by replicate and image, [R, images] each. A product of two calls' residuals
    has about the square of the calls' variance, and pairs are as good as independent.
    """
    same, num_same = _cross_products(sums).sum(), _cross_products(visits).sum()
    whole, num_whole = _cross_products(sums.sum(axis=1)), _cross_products(visits.sum(axis=1))
    if num_same in (0, num_whole):  # a single image: none differs
        return 0.0, 0.0
    variance = float(same / num_same - (whole - same) / (num_whole - num_same))
    return max(0.0, variance), float(call_variance**2 / (num_same / 2))


def _cross_products(x: NDArray[Any]) -> NDArray[np.float64]:
    """Sum over r != s of x_r x_s, along the first axis."""
    product: NDArray[np.float64] = np.square(x.sum(axis=0)) - np.square(x).sum(axis=0)
    return product


def exact_mean(by_image: NDArray[np.float64], num_images: int) -> Mean:
    """The mean of images' values [swept], each looked at at every t; `num_images`: of the split.

    With one noise for each (image, t), nothing tells the noise's part of the spread between images from the images'
    own: for a part of the split the error is taken to be all the images', and of a whole split, where only the noise
    is left, none can be given. (The noise's part is small: it averages over all t and images.)
    """
    swept = len(by_image)
    mean = float(by_image.mean())
    if swept == 1:
        return Mean(mean, None, None, 0.0 if num_images == 1 else None, None, swept, 0.0)
    variance = float(by_image.var(ddof=1))
    images = float(np.sqrt(variance * (1 / swept - 1 / num_images)))
    return Mean(
        value=mean,
        stderr=images if swept < num_images else None,
        stderr_time_noise=None,
        stderr_images=images,
        stderr_population=float(np.sqrt(variance / swept)),
        num_replicates=swept,
        freedom=swept - 1.0,
    )
