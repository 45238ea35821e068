"""Moments and the Fréchet distance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from evaluation.metrics.frechet import factor, frechet_distance, frechet_features, frechet_gaussians, nuclear_norm
from evaluation.moments import Gaussian, Moments, moments_of


def features(num: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) * np.geomspace(1, 1e-3, dim)
    return rng.standard_normal((num, dim)) @ mixing + rng.standard_normal(dim)


def covariance(dim: int, seed: int) -> np.ndarray:
    return np.cov(features(4 * dim, dim, seed), rowvar=False)


def test_equal_covariances_leave_the_distance_of_the_means() -> None:
    sigma = covariance(12, 0)
    x, y = np.random.default_rng(1).standard_normal((2, 12))
    assert frechet_gaussians(x, sigma, y, sigma) == pytest.approx(float((x - y) @ (x - y)), abs=1e-10)


def test_commuting_covariances() -> None:
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.standard_normal((9, 9)))
    a, b = rng.uniform(0.01, 4, (2, 9))
    zero = np.zeros(9)
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_gaussians(zero, basis * a @ basis.T, zero, basis * b @ basis.T) == pytest.approx(expected, abs=1e-10)


def test_known_two_by_two() -> None:
    found = frechet_gaussians([0, 0], [[2, 1], [1, 2]], [0, 0], np.diag([3.0, 1.0]))
    assert found == pytest.approx(0.5166852264521173, abs=1e-10)


def test_agrees_with_the_eigenvalues_of_the_product() -> None:
    a, b = covariance(30, 3), covariance(30, 4)
    root_trace = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_gaussians(np.zeros(30), a, np.zeros(30), b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-9, 0.0])
def test_nuclear_norm_of_any_conditioning(smallest: float) -> None:
    rng = np.random.default_rng(10)
    left, right = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    values = np.append(np.geomspace(1, max(smallest, 1e-9), 39), smallest)
    matrix = left * values @ right.T
    assert nuclear_norm(matrix) == pytest.approx(values.sum(), rel=1e-12)
    assert nuclear_norm(matrix[:, :15]) == pytest.approx(np.linalg.svd(matrix[:, :15])[1].sum(), rel=1e-12)


@pytest.mark.parametrize("small", np.geomspace(1e-1, 1e-8, 15))
def test_nuclear_norm_where_the_gram_matrix_is_at_its_worst(small: float) -> None:
    """Many singular values far below the largest: up to where its error is bounded well, and beyond."""
    rng = np.random.default_rng(11)
    left, right = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    values = np.append(1.0, np.full(59, small))
    assert nuclear_norm(left * values @ right.T) == pytest.approx(values.sum(), rel=2e-10)


@pytest.mark.parametrize(("ones", "zeros", "small"), [(30, 1, 0.0), (18, 2, 1e-9), (200, 12, 0.0), (482, 30, 3e-9)])
def test_nuclear_norm_of_equal_values_and_nothing(ones: int, zeros: int, small: float) -> None:
    """A rounding error of the Gram matrix is as large as its own root in a singular value of zero."""
    rng, num = np.random.default_rng(12), ones + zeros
    left, right = (np.linalg.qr(rng.standard_normal((num, num)))[0] for _ in range(2))
    values = np.append(np.ones(ones), np.full(zeros, small))
    assert nuclear_norm(left * values @ right.T) == pytest.approx(values.sum(), rel=1e-10)


@pytest.mark.parametrize("num", [2, 20, 64, 120, 300])
def test_images_against_themselves(num: int) -> None:
    """Fewer than dimensions: centred, they have a singular value of exactly zero."""
    x = np.random.default_rng(13).gamma(0.3, 2.0, (num, 400)).astype(np.float32)
    assert frechet_features(x, x) == pytest.approx(0, abs=1e-8)


def test_equal_covariances_with_nearly_nothing_in_some_directions() -> None:
    covariance = np.diag(np.append(np.ones(62), [1e-9, 1e-9]))
    basis = np.linalg.qr(np.random.default_rng(14).standard_normal((64, 64)))[0]
    sigma = basis @ covariance @ basis.T
    assert frechet_gaussians(np.zeros(64), sigma, np.full(64, 0.5), sigma) == pytest.approx(16.0, abs=1e-9)


def test_distance_to_itself_is_zero_and_it_is_symmetric() -> None:
    x, y = features(100, 20, 5), features(90, 20, 6)
    assert frechet_features(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_features(x, y) == pytest.approx(frechet_features(y, x), rel=1e-12)


@pytest.mark.parametrize(("num_x", "num_y"), [(6, 6), (6, 200), (200, 6), (20, 21), (21, 20), (2, 2)])
def test_fewer_images_than_dimensions_is_exact(num_x: int, num_y: int) -> None:
    """Against the eigenvector factors of the singular covariances, an independent route."""
    x, y = features(num_x, 20, 7), features(num_y, 20, 8)
    direct = frechet_gaussians(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet_features(x, y) == pytest.approx(direct, rel=1e-9)


def test_rank_deficient_closed_form() -> None:
    """Rank one: covariances u u^T and v v^T have the trace |u . v|."""
    u, v = np.random.default_rng(9).standard_normal((2, 50))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    x, y = (np.stack([w, -w]) / np.sqrt(2) for w in (u, v))
    assert frechet_features(x, y) == pytest.approx(expected, abs=1e-10)
    zero = np.zeros(50)
    assert frechet_gaussians(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, abs=1e-10)


def test_identical_images_have_no_covariance() -> None:
    x = np.ones((5, 8))
    assert frechet_features(x, 2 * x) == pytest.approx(8, abs=1e-12)


def test_factor_refuses_what_is_no_covariance() -> None:
    with pytest.raises(DataError, match="negative eigenvalue"):
        factor(np.diag([1.0, -0.5]))
    with pytest.raises(DataError, match="not symmetric"):
        factor(np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(DataError, match="not finite"):
        frechet_gaussians([0, 0], np.diag([1.0, np.nan]), [0, 0], np.eye(2))
    with pytest.raises(DataError, match="fit together"):
        frechet_gaussians([0, 0], np.eye(2), [0, 0, 0], np.eye(3))


def test_nan_mean_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        frechet_gaussians([np.nan, 0], np.eye(2), [0, 0], np.eye(2))


def test_a_hand_made_nan_is_refused_too() -> None:
    bad = Gaussian(np.zeros(4), np.eye(4), np.full((3, 4), np.nan))
    with pytest.raises(DataError, match="not finite"):
        frechet_distance(bad, bad)


def test_nan_features_are_refused() -> None:
    x = features(10, 4)
    x[3, 2] = np.nan
    with pytest.raises(DataError, match="1 of 10 feature vectors are not finite"):
        moments_of(x)


def test_moments_equal_numpy_even_far_from_zero() -> None:
    x = features(60, 10) + 1e6
    moments = moments_of(x)
    assert np.allclose(moments.mean, x.mean(0), rtol=1e-14)
    assert np.allclose(moments.covariance, np.cov(x - 1e6, rowvar=False), rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=6), order=st.randoms(use_true_random=False))
def test_any_cutting_and_order_of_merging_gives_the_same(cuts: list[int], order: object) -> None:
    x = features(40, 12)
    bounds = [0, *sorted(set(cuts)), 40]
    parts = [moments_of(x[a:b]) for a, b in itertools.pairwise(bounds)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    merged = Moments(12)
    for part in parts:
        merged.merge(part)
    whole = moments_of(x)
    assert merged.num == 40
    assert np.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert np.allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    assert merged.features is None


def test_merging_leaves_the_other_side_alone() -> None:
    x = features(8, 12)
    first, second = moments_of(x[:4]), moments_of(x[4:])
    first.merge(second)
    assert first.features is not None
    assert np.array_equal(first.features, x)
    assert second.num == 4
    assert np.allclose(second.mean, x[4:].mean(0))


def test_memory_does_not_grow_with_images() -> None:
    moments = Moments(12)
    for start in range(0, 12, 4):
        moments.add(features(4, 12, start))
    assert moments.features is not None
    moments.add(features(1, 12))
    assert moments.features is None
    assert moments._kept is None
