"""Gathering a stream of features, their cache, and reference features of a data split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy_net import ToyNet, bare_net, in_parts, some_images

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import DataError
from evaluation.chunks import Arrays, Chunks
from evaluation.features import identity_of
from evaluation.features.feature_set import (
    BLOCK,
    FeatureSet,
    feature_arrays,
    gather,
    in_blocks,
    read_feature_set,
    spread,
)
from evaluation.features.reference import published_features, real_floor, reference_features
from evaluation.metrics.inception_score import inception_scores
from evaluation.moments import moments_of
from evaluation.quality import KINDS
from evaluation.statistics import write_stats


def arrays_of(images: NDArray[np.uint8], net: ToyNet | None = None) -> Arrays:
    return feature_arrays((net or ToyNet())(torch.from_numpy(images).permute(0, 3, 1, 2)))


def assert_same(x: FeatureSet, y: FeatureSet) -> None:
    """Bit for bit."""
    assert (x.identity, x.data, x.num) == (y.identity, y.data, y.num)
    for ours, other in ((x.stats.pool, y.stats.pool), (x.stats.spatial, y.stats.spatial)):
        assert ours is not None
        assert other is not None
        assert np.array_equal(ours.mean, other.mean)
        assert np.array_equal(ours.covariance, other.covariance)
    assert np.array_equal(x.stats.inception_scores, y.stats.inception_scores)  # type: ignore[arg-type]
    assert np.array_equal(x.rows, y.rows)  # type: ignore[arg-type]


def test_what_is_gathered_is_what_the_features_say() -> None:
    arrays = arrays_of(some_images(50))
    found = gather(ToyNet(), in_parts(arrays, [7, 30]), data="d", num=50)
    assert np.array_equal(found.rows, arrays["pool"])  # type: ignore[arg-type]
    for gaussian, name in ((found.stats.pool, "pool"), (found.stats.spatial, "spatial")):
        assert gaussian is not None
        assert np.allclose(gaussian.mean, arrays[name].mean(axis=0), rtol=1e-6)
        assert np.allclose(gaussian.covariance, np.cov(arrays[name].astype(float), rowvar=False), rtol=1e-9)
    assert np.allclose(found.stats.inception_scores, inception_scores(arrays["probs"]), rtol=1e-12)  # type: ignore[arg-type]


BIG = arrays_of(some_images(2 * BLOCK + 100, size=2))
WHOLE = gather(ToyNet(), in_parts(BIG, []), data="d", num=2 * BLOCK + 100)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 3, 256, BLOCK - 1, BLOCK, BLOCK + 1]), max_size=5))
def test_how_the_stream_was_cut_does_not_show(sizes: list[int]) -> None:
    assert_same(gather(ToyNet(), in_parts(BIG, sizes), data="d", num=2 * BLOCK + 100), WHOLE)


def test_blocks_keep_the_order_and_all_rows() -> None:
    parts = iter([{"pool": np.arange(start, stop)[:, None]} for start, stop in ((0, 3), (3, 3), (3, 17), (17, 21))])
    blocks = [block["pool"][:, 0].tolist() for block in in_blocks(parts, 8)]
    assert blocks == [list(range(8)), list(range(8, 16)), list(range(16, 21))]


def test_few_images_keep_their_vectors() -> None:
    arrays = arrays_of(some_images(3))
    found = gather(bare_net(), in_parts({"pool": arrays["pool"]}, []), data="d", num=3)
    assert found.stats.pool.vectors is not None
    assert np.array_equal(found.stats.pool.vectors, arrays["pool"])
    assert (found.stats.spatial, found.stats.inception_scores) == (None, None)


def test_what_is_wrong_with_a_stream_is_said(tmp_path: Path) -> None:
    arrays = arrays_of(some_images(10))
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        gather(ToyNet(), in_parts(arrays, []), data="", num=1)
    with pytest.raises(DataError, match="features of 9 images were announced, 10 or more came"):
        gather(ToyNet(), in_parts(arrays, []), data="", num=9, folder=tmp_path)
    with pytest.raises(DataError, match="features of 11 images were announced, 10 or more came"):
        gather(ToyNet(), in_parts(arrays, []), data="", num=11, folder=tmp_path)
    bad = arrays["pool"].copy()
    bad[4, 1] = np.nan
    with pytest.raises(DataError, match="1 of 10 feature vectors are not finite"):
        gather(ToyNet(), in_parts(arrays | {"pool": bad}, []), data="", num=10, folder=tmp_path)
    with pytest.raises(DataError, match=r"\[N, 3\] are expected, not \[10, 2\]"):
        gather(ToyNet(), in_parts(arrays | {"pool": bad[:, :2]}, []), data="", num=10, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_set_is_found_whole_or_not_at_all(tmp_path: Path) -> None:
    net = ToyNet()
    made = gather(net, in_parts(arrays_of(some_images(20)), []), data="d", num=20, folder=tmp_path)
    found = read_feature_set(tmp_path, identity_of(net), data="d", num=20)
    assert found is not None
    assert_same(found, made)
    assert read_feature_set(tmp_path, identity_of(net), data="e", num=20) is None
    assert read_feature_set(tmp_path, identity_of(net), data="d", num=19) is None
    assert read_feature_set(tmp_path, identity_of(ToyNet(resize=9)), data="d", num=20) is None
    rows = (tmp_path / "rows.npy").read_bytes()
    (tmp_path / "rows.npy").write_bytes(rows[:-8])
    assert read_feature_set(tmp_path, identity_of(net), data="d", num=20) is None
    (tmp_path / "rows.npy").write_bytes(rows)
    (tmp_path / "statistics.npz").write_bytes(b"half")
    assert read_feature_set(tmp_path, identity_of(net), data="d", num=20) is None


def test_features_of_single_images_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    net, arrays = ToyNet(), arrays_of(some_images(20))
    made = gather(net, in_parts(arrays, []), data="d", num=20, folder=tmp_path, with_rows=False)
    assert made.rows is None
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]
    found = read_feature_set(tmp_path, identity_of(net), data="d", num=20, with_rows=False)
    assert found is not None
    assert np.array_equal(found.stats.pool.covariance, made.stats.pool.covariance)
    assert read_feature_set(tmp_path, identity_of(net), data="d", num=20) is None
    assert read_feature_set(tmp_path, identity_of(net), data="d", num=19, with_rows=False) is None
    whole = gather(net, in_parts(arrays, []), data="d", num=20)
    assert np.array_equal(found.stats.pool.covariance, whole.stats.pool.covariance)


def test_of_many_images_some_rows_are_kept_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.features.feature_set.MAX_ROWS", 100)
    num = 2 * BLOCK + 100
    made = gather(ToyNet(), in_parts(BIG, []), data="d", num=num, folder=tmp_path)
    assert np.array_equal(made.rows, BIG["pool"][spread(num, 100)])  # type: ignore[arg-type]
    assert np.array_equal(made.stats.pool.covariance, WHOLE.stats.pool.covariance)
    found = read_feature_set(tmp_path, identity_of(ToyNet()), data="d", num=num)
    assert found is not None
    assert_same(found, made)


# ---- of a data split -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(generated_data: Path) -> ShardDataset:
    return ShardDataset(generated_data / "train")


def test_spread_covers_the_split_with_disjoint_parts() -> None:
    assert spread(10, None).tolist() == list(range(10))
    first, second = (spread(100, 20, part=part, parts=2) for part in (0, 1))
    assert not set(first.tolist()) & set(second.tolist())
    assert len(first) == len(second) == 20
    assert first[-1] >= 90
    with pytest.raises(DataError, match="2 x 51 images are asked for; there are 100"):
        spread(100, 51, parts=2)


def test_reference_features_are_those_of_the_images_and_cached(split: ShardDataset, tmp_path: Path) -> None:
    net = ToyNet()
    first = reference_features(split, net, cache=tmp_path)
    images, _ = split.read(np.arange(len(split)))
    expected = moments_of(images.astype(np.float64).mean(axis=(2, 3)))
    assert np.allclose(first.stats.pool.covariance, expected.covariance, rtol=1e-5)
    assert (first.num, first.data, first.identity) == (len(split), split.manifest.fingerprint, identity_of(net))
    calls = len(net.calls)
    assert_same(reference_features(split, net, cache=tmp_path), first)
    assert len(net.calls) == calls
    for other in (ToyNet(weights_sha256="1" * 64), ToyNet(resize=16), ToyNet(name="another")):
        reference_features(split, other, cache=tmp_path)
        assert other.calls
    assert reference_features(split, net, num=10, cache=tmp_path).num == 10


def test_processes_share_the_work(split: ShardDataset, tmp_path: Path) -> None:
    alone = reference_features(split, ToyNet())
    chunks = Chunks(tmp_path / "chunks")
    assert_same(reference_features(split, ToyNet(), chunks=chunks), alone)
    idle = ToyNet()
    assert_same(reference_features(split, idle, chunks=chunks), alone)
    assert idle.calls == []


def test_real_against_real(split: ShardDataset, tmp_path: Path) -> None:
    floor = real_floor(split, ToyNet(), KINDS, num=100, cache=tmp_path)
    assert tuple(floor) == KINDS
    assert floor["fd"].value > 1e-3  # other images, though as many
    assert floor == real_floor(split, ToyNet(), KINDS, num=100, cache=tmp_path)
    assert floor["precision"].value > 0.8
    assert abs(floor["kd"].value) < 4 * (floor["kd"].stderr or 0)
    with pytest.raises(DataError, match="2 x 129 images are asked for; there are 256"):
        real_floor(split, ToyNet(), KINDS, num=129)


def test_published_statistics(tmp_path: Path) -> None:
    whole = gather(ToyNet(), in_parts(arrays_of(some_images(60)), []), data="d", num=60)
    path = tmp_path / "virtual.npz"
    pool = whole.stats.pool
    np.savez(path, mu=pool.mean, sigma=pool.covariance, arr_0=some_images(12))
    found = published_features(path, ToyNet(), with_rows=True)
    assert found.identity.is_foreign
    assert np.array_equal(found.rows, arrays_of(some_images(12))["pool"])  # type: ignore[arg-type]
    assert published_features(path, ToyNet(), with_rows=False).rows is None
    with pytest.raises(DataError, match=r"3 dimensions, the features of inception have 5: .* --feature-net"):
        published_features(path, ToyNet(dim=5), with_rows=False)
    write_stats(path, whole.stats)
    assert published_features(path, ToyNet(), with_rows=True).rows is None
    with pytest.raises(DataError, match=r"weights_sha256 .* against"):
        published_features(path, ToyNet(weights_sha256="1" * 64), with_rows=False)
