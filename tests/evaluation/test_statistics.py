"""Files of feature statistics: ours, ADM's, pytorch-fid's; what may be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from evaluation.metrics.frechet import frechet_distance
from evaluation.moments import Gaussian, moments_of
from evaluation.statistics import (
    UNKNOWN,
    FeatureIdentity,
    FeatureStats,
    read_stats,
    require_comparable,
    says_its_net,
    write_stats,
)

IDENTITY = FeatureIdentity("inception", "a" * 64, 299)


def gaussian(num: int, dim: int, seed: int = 0) -> Gaussian:
    return moments_of(np.random.default_rng(seed).standard_normal((num, dim))).gaussian()


@pytest.mark.parametrize("num", [5, 50])  # with and without kept vectors
def test_round_trip_is_exact(tmp_path: Path, num: int) -> None:
    stats = FeatureStats(IDENTITY, "cifar", num, gaussian(num, 10), gaussian(num, 7, 1), np.array([3.0, 4.0]))
    write_stats(tmp_path / "stats.npz", stats)
    found = read_stats(tmp_path / "stats.npz", identity=IDENTITY, data="cifar")
    assert (found.identity, found.data, found.num) == (IDENTITY, "cifar", num)
    assert found.spatial is not None
    assert stats.spatial is not None
    for ours, read in ((stats.pool, found.pool), (stats.spatial, found.spatial)):
        other = gaussian(20, ours.dim, 2)
        assert frechet_distance(read, other) == frechet_distance(ours, other)
        assert (read.vectors is None) == (ours.vectors is None)
    assert found.inception_scores is not None
    assert found.inception_scores.tolist() == [3.0, 4.0]
    assert says_its_net(tmp_path / "stats.npz") == "inception"


def test_ours_can_be_read_by_their_names(tmp_path: Path) -> None:
    """pytorch-fid reads mu and sigma, ADM's evaluator mu_s and sigma_s as well."""
    stats = FeatureStats(IDENTITY, "", 50, gaussian(50, 10), gaussian(50, 7, 1))
    write_stats(tmp_path / "stats.npz", stats)
    with np.load(tmp_path / "stats.npz") as file:
        assert np.array_equal(file["mu"], stats.pool.mean)
        assert np.array_equal(file["sigma"], stats.pool.covariance)
        assert file["mu_s"].shape == (7,)
        assert file["sigma_s"].shape == (7, 7)


def test_a_file_of_pytorch_fid(tmp_path: Path) -> None:
    path = tmp_path / "fid_stats.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert says_its_net(path) is None
    with pytest.raises(DataError, match="does not say which feature net"):
        read_stats(path)
    found = read_stats(path, identity=IDENTITY)
    assert found.identity.weights_sha256 == UNKNOWN
    assert (found.identity.net, found.num, found.data, found.spatial) == ("inception", 0, "", None)
    require_comparable(found.identity, IDENTITY)
    with pytest.raises(DataError, match="net 'inception' against 'efflite0'"):
        require_comparable(found.identity, FeatureIdentity("efflite0", "b", 128))


def test_a_file_of_adm(tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_imagenet64_labeled.npz"
    pool, spatial = gaussian(50, 10), gaussian(50, 7, 1)
    np.savez_compressed(
        path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=pool.mean, sigma=pool.covariance,
        mu_s=spatial.mean.astype(np.float32), sigma_s=spatial.covariance.astype(np.float32),
    )  # fmt: skip
    found = read_stats(path, identity=IDENTITY)
    assert np.array_equal(found.pool.covariance, pool.covariance)
    assert found.spatial is not None
    assert found.spatial.covariance.dtype == np.float64
    assert frechet_distance(found.spatial, spatial) < 1e-6


@pytest.mark.parametrize("changes", [{"net": "b"}, {"weights_sha256": "b"}, {"resize": 64}])
def test_statistics_of_another_net_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    other = FeatureIdentity(**{**vars(IDENTITY), **changes})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"{next(iter(changes))} .* against"):
        require_comparable(IDENTITY, other)
    write_stats(tmp_path / "stats.npz", FeatureStats(other, "", 5, gaussian(5, 4)))
    with pytest.raises(DataError, match=f"{next(iter(changes))} .* against"):
        read_stats(tmp_path / "stats.npz", identity=IDENTITY)


def test_statistics_of_other_images_are_refused(tmp_path: Path) -> None:
    write_stats(tmp_path / "stats.npz", FeatureStats(IDENTITY, "c" * 64, 5, gaussian(5, 4)))
    with pytest.raises(DataError, match=r"is of other images: fingerprint c+, expected d+"):
        read_stats(tmp_path / "stats.npz", data="d" * 64)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(DataError, match="there is no file"):
        read_stats(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(DataError, match="not a readable npz"):
        read_stats(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not a readable npz"):
        read_stats(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(DataError, match="has no sigma"):
        read_stats(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(DataError, match=r"mu \[3\] and sigma \[4, 4\]"):
        read_stats(path, identity=IDENTITY)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("mu", np.array(["a", "b", "c"]), r"mu is <U1 \[3\]; real numbers in 1 dimensions"),
        ("mu", np.array([0, np.inf, 0]), "not finite in mu"),
        ("sigma", np.full((3, 3), np.nan), "not finite in sigma"),
        ("sigma", np.eye(3) + 1j, r"sigma is complex128 \[3, 3\]"),
        ("sigma", np.diag([1.0, 1.0, -1.0]), "sigma: a covariance has the negative eigenvalue -1"),
        ("sigma", np.eye(3) + np.eye(3, k=1), "sigma: a covariance is not symmetric"),
        ("sigma_s", np.diag([1.0, -1.0]), "sigma_s: a covariance has the negative eigenvalue -1"),
        ("inception_scores", np.array([3.0, np.nan]), "not finite in inception_scores"),
        ("inception_scores", np.zeros(0), r"inception_scores is float64 \[0\]"),
        ("N", np.array([50, 50]), r"N is int64 \[2\]"),
        ("N", np.float64(-1), "N is -1; a whole number from 0"),
        ("resize", np.array("large"), r"resize is <U5 \[\]"),
        ("features", np.array("none"), r"features is <U4 \[\]"),
        ("features", np.zeros((3, 5)), r"features is \[3, 5\], not \[2 or more, 3\] as mu has it"),
        ("features", np.zeros((1, 3)), r"features is \[1, 3\], not \[2 or more, 3\]"),
    ],
)
def test_bad_contents(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    path = tmp_path / "bad.npz"
    write_stats(path, FeatureStats(IDENTITY, "", 50, gaussian(50, 3), gaussian(50, 2), np.array([3.0, 4.0])))
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: array})
    with pytest.raises(DataError, match=rf"bad\.npz.*{message}"):
        read_stats(path)
