"""Kernel distance, inception score, precision and recall: against their definitions and in closed cases."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from evaluation.metrics.inception_score import InceptionScore, inception_scores
from evaluation.metrics.kernel import kernel_distance, witness
from evaluation.metrics.precision_recall import precision_recall, squared_distances, squared_radii

Array = NDArray[np.float64]


def features(num: int, dim: int, seed: int = 0, shift: float = 0.0) -> Array:
    return np.random.default_rng(seed).standard_normal((num, dim)) + shift


# ---- kernel distance -------------------------------------------------------------------------------------------------


def brute_force_mmd2(x: Array, y: Array) -> float:
    def k(a: Array, b: Array) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    within = [
        sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_mmd_is_its_definition() -> None:
    x, y = features(7, 4), features(9, 4, 1, shift=0.5)
    of_x, of_y = witness(x, y)
    assert of_x.mean() + of_y.mean() == pytest.approx(brute_force_mmd2(x, y), rel=1e-12)


def test_kernel_distance_of_single_points() -> None:
    u, v = features(2, 6)
    expected = (u @ u / 6 + 1) ** 3 + (v @ v / 6 + 1) ** 3 - 2 * (u @ v / 6 + 1) ** 3
    found = kernel_distance(np.tile(u, (5, 1)), np.tile(v, (8, 1)), num_subsets=3, subset_size=4)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-7)


def test_kernel_distance_of_all_rows_is_one_subset() -> None:
    x, y = features(40, 5), features(40, 5, 1, shift=0.3)
    of_x, of_y = witness(x, y)
    found = kernel_distance(x, y, subset_size=40)
    assert (found.num_subsets, found.std) == (1, 0)
    assert found.value == pytest.approx(of_x.mean() + of_y.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(2 * np.sqrt((of_x.var(ddof=1) + of_y.var(ddof=1)) / 40), rel=1e-12)


def test_subsets_average_to_the_whole_and_repeat() -> None:
    x, y = features(60, 4).astype(np.float32), features(80, 4, 1, shift=0.4).astype(np.float32)
    whole = sum(part.mean() for part in witness(x.astype(np.float64), y.astype(np.float64)))
    found = kernel_distance(x, y, num_subsets=400, subset_size=20)
    assert found.value == pytest.approx(whole, abs=4 * found.std / 20)
    assert found == kernel_distance(x, y, num_subsets=400, subset_size=20)
    assert found.value != kernel_distance(x, y, num_subsets=400, subset_size=20, seed=1).value


def test_the_standard_error_is_the_scatter_over_new_images() -> None:
    """A standard deviation of 80 draws is known to 8 %, so that 3 of them are 25 %."""
    found = [
        kernel_distance(features(100, 6, 2 * n, shift=0.4), features(250, 6, 2 * n + 1), num_subsets=25, subset_size=50)
        for n in range(80)
    ]
    scatter = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.stderr for one in found]) == pytest.approx(scatter, rel=0.25)


def test_subsets_larger_than_a_set_are_refused() -> None:
    with pytest.raises(DataError, match="of 40 and 30 images needs two subsets or more, of 2 to 30 images"):
        kernel_distance(features(40, 3), features(30, 3), subset_size=31)
    with pytest.raises(DataError, match="3 and 4 dimensions"):
        kernel_distance(features(4, 3), features(4, 4), subset_size=2)


# ---- inception score -------------------------------------------------------------------------------------------------


def probabilities(num: int, classes: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), num)


def test_undecided_classes_score_one_and_decided_ones_their_number() -> None:
    assert np.allclose(inception_scores(np.full((50, 4), 0.25)), 1, rtol=1e-14)
    decided = np.eye(4)[np.arange(80) % 4]
    assert np.allclose(inception_scores(decided), 4, rtol=1e-14)


def test_inception_score_is_its_definition() -> None:
    p = probabilities(53, 6)
    expected = []
    for split in range(10):
        part = p[split * 53 // 10 : (split + 1) * 53 // 10]
        divergences = [sum(q * np.log(q / m) for q, m in zip(row, part.mean(axis=0), strict=True)) for row in part]
        expected.append(np.exp(np.mean(divergences)))
    assert np.allclose(inception_scores(p), expected, rtol=1e-12)
    assert len(inception_scores(p[:3])) == 3


@pytest.mark.parametrize("size", [1, 7, 50])
def test_inception_score_of_a_stream(size: int) -> None:
    p = probabilities(53, 6)
    score = InceptionScore(53, 6)
    for start in range(0, 53, size):
        score.add(p[start : start + size])
    assert np.allclose(score.scores(), inception_scores(p), rtol=1e-13)


def test_what_is_no_probability_is_refused() -> None:
    good = probabilities(4, 3)
    for bad in (good * 2, -good, np.where(good == good.max(), np.nan, good)):
        with pytest.raises(DataError, match="must be finite, not negative, and add up to one"):
            inception_scores(bad)
    with pytest.raises(DataError, match=r"\[n, 3\] are expected, not \[4, 2\]"):
        InceptionScore(4, 3).add(good[:, :2])


# ---- precision and recall --------------------------------------------------------------------------------------------


def brute_force_precision_recall(samples: Array, real: Array, k: int) -> tuple[float, float]:
    def distance(a: Array, b: Array) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radii(x: Array) -> list[float]:
        return [sorted(distance(a, b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]

    def covered(x: Array, y: Array) -> float:
        balls = list(zip(y, radii(y), strict=True))
        return float(np.mean([any(distance(a, centre) <= radius for centre, radius in balls) for a in x]))

    return covered(samples, real), covered(real, samples)


@pytest.mark.parametrize("block", [2048, 16, 5])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(block: int, k: int) -> None:
    samples, real = features(60, 3, shift=0.8), features(45, 3, 1)
    expected = brute_force_precision_recall(samples, real, k)
    assert 0.1 < min(expected) < max(expected) < 0.95
    assert precision_recall(samples, real, k=k, block=block) == pytest.approx(expected, abs=1e-12)


def test_equal_sets_cover_each_other_and_far_ones_do_not() -> None:
    x = features(30, 4).astype(np.float32)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_a_distance_equal_to_the_radius_is_within() -> None:
    real = np.arange(4.0)[:, None]  # the third neighbour of 0 is at 3
    assert squared_radii(real, k=3).tolist() == [9, 4, 4, 9]
    spread_out = np.array([[-3.0], [100.0], [200.0], [300.0]])
    assert precision_recall(spread_out, real) == (0.25, 1)
    spread_out[0] = -3.0001
    assert precision_recall(spread_out, real)[0] == 0


def test_copies_have_no_distance() -> None:
    """|u|^2 + |v|^2 - 2 u.v alone would leave a rounding error, and a radius of zero would hold only some copies."""
    import torch

    u = torch.from_numpy(features(1, 2048, shift=30.0).astype(np.float32)).double()
    assert squared_distances(u.repeat(6, 1), u.repeat(5, 1)).eq(0).all()
    copies = np.tile(u.numpy(), (5, 1))
    assert precision_recall(copies, copies) == (1, 1)
    near = copies + np.eye(5, 2048) * 1e-3
    assert precision_recall(near, copies) == (0, 1)


def test_too_few_images_for_neighbours() -> None:
    with pytest.raises(DataError, match="k = 3 need at least 4 images, not 3"):
        precision_recall(features(3, 2), features(9, 2))
    with pytest.raises(DataError, match="2 and 3 dimensions"):
        precision_recall(features(9, 2), features(9, 3))
