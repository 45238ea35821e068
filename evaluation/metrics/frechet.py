"""The Fréchet distance of two Gaussians (Dowson & Landau 1982), exact in full and in deficient rank.

    d^2 = |mu_x - mu_y|^2 + tr Sigma_x + tr Sigma_y - 2 tr (Sigma_x Sigma_y)^(1/2)

For any factors with Sigma = F F^T, the last trace is the nuclear norm (sum of singular values) of F_x^T F_y. So one
formula serves every case: F is the Cholesky factor, or the centred features themselves where there are fewer images
than dimensions. Only symmetric matrices and singular values are ever decomposed: nothing can become complex.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.errors import DataError
from evaluation.moments import Gaussian, moments_of

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_GRAM_TOLERANCE = 1e-10  # of the sum
_GRAM_ROUNDING = 8 * _EPS  # of the largest eigenvalue; errors of up to one epsilon were seen, at up to 2048 dimensions


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """Fréchet distance (squared, as FID is) of two sets of vectors.

    It is biased upwards in the number of vectors: report N of both beside it.

    Raises:
        DataError: shapes that do not fit, values that are not finite, a matrix that is no covariance.
    """
    return _distance(x.mean, _factor_of(x), y.mean, _factor_of(y))


def frechet_gaussians(mu_x: ArrayLike, sigma_x: ArrayLike, mu_y: ArrayLike, sigma_y: ArrayLike) -> float:
    """Fréchet distance (squared) of two Gaussians given by means [d] and covariances [d, d]. Raises as above."""
    mean_x, mean_y = np.asarray(mu_x, np.float64), np.asarray(mu_y, np.float64)
    return _distance(mean_x, factor(np.asarray(sigma_x, np.float64)), mean_y, factor(np.asarray(sigma_y, np.float64)))


def frechet_features(x: ArrayLike, y: ArrayLike) -> float:
    """Fréchet distance (squared) of two sets of vectors [N, d] in memory, of any N >= 2. Raises as above."""
    return frechet_distance(moments_of(x).gaussian(), moments_of(y).gaussian())


def factor(covariance: Array) -> Array:
    """F [d, r] with F F^T = covariance [d, d]: the Cholesky factor, or an eigenvector factor where singular.

    Raises:
        DataError: the matrix is not square, symmetric, finite and positive semi-definite.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise DataError(f"a covariance is a square matrix, not {list(covariance.shape)}.")
    if not np.isfinite(covariance).all():
        raise DataError("a covariance holds values that are not finite.")
    scale = float(np.abs(covariance).max(initial=0.0))
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-6 * scale:
        raise DataError("a covariance is not symmetric.")
    symmetric = (covariance + covariance.T) / 2
    try:
        lower: Array = np.linalg.cholesky(symmetric)
        return lower
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(symmetric)
    tolerance = len(values) * _EPS * max(values[-1], 0.0)
    # Float32 files of singular covariances have eigenvalues slightly below zero; more than that is another matrix.
    if values[0] < -max(tolerance, 1e-6 * scale * len(values) ** 0.5):
        raise DataError(f"a covariance has the negative eigenvalue {values[0]:.3g} (largest {values[-1]:.3g}).")
    kept = values > tolerance
    scaled: Array = vectors[:, kept] * np.sqrt(values[kept])
    return scaled


def feature_factor(features: Array) -> Array:
    """F [d, N] with F F^T = the unbiased covariance of features [N, d], from the centred features themselves.

    Raises:
        DataError: fewer than two vectors.
    """
    if len(features) < 2:
        raise DataError(f"a covariance needs at least 2 images, not {len(features)}.")
    scaled: Array = (features - features.mean(axis=0)).T / np.sqrt(len(features) - 1)
    return scaled


def nuclear_norm(matrix: Array) -> float:
    """Sum of the singular values of a matrix [m, n], to 1e-10 relative; NaN for a matrix that is not finite.

    They are the square roots of the eigenvalues of the Gram matrix, three times quicker than by a decomposition of the
    matrix itself; but a rounding error of the largest eigenvalue weighs heavily in the root of a small one, and most
    of all in that of a zero. Where that could matter the singular values are computed directly.
    """
    if matrix.size == 0:
        return 0.0
    if not np.isfinite(matrix).all():
        return float("nan")
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = np.linalg.eigvalsh(wide @ wide.T)
    rounding = _GRAM_ROUNDING * squares[-1]
    high, low = np.sqrt(np.maximum(squares + rounding, 0)), np.sqrt(np.maximum(squares - rounding, 0))
    if (high - low).sum() <= _GRAM_TOLERANCE * low.sum():
        return float(np.sqrt(np.maximum(squares, 0)).sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def _factor_of(gaussian: Gaussian) -> Array:
    return factor(gaussian.covariance) if gaussian.vectors is None else feature_factor(gaussian.vectors)


def _distance(mean_x: Array, factor_x: Array, mean_y: Array, factor_y: Array) -> float:
    if not mean_x.shape == mean_y.shape == factor_x.shape[:1] == factor_y.shape[:1]:
        raise DataError(
            f"means {list(mean_x.shape)}, {list(mean_y.shape)} and covariances of {factor_x.shape[0]}, "
            f"{factor_y.shape[0]} dimensions do not fit together."
        )
    traces = float(np.vdot(factor_x, factor_x) + np.vdot(factor_y, factor_y))
    delta = mean_x - mean_y
    cross = factor_x.T @ factor_y  # [r_x, r_y]
    shared = nuclear_norm(cross)
    value = float(delta @ delta) + traces - 2 * shared
    if not np.isfinite(value):
        raise DataError("the Fréchet distance is not finite: the features hold NaN or are far too large.")
    # Equal Gaussians cancel to a rounding error of the traces, of either sign.
    assert value > -1e-9 * max(traces, 1.0), value
    return max(value, 0.0)
