"""A split at a URL: the same samples as from its folder, each shard fetched once, and damage on the way mended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import HttpFiles, serve_http

from data_pipeline.dataset import DamagedSampleError, ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.shard_cache import CacheSettings
from data_pipeline.stream import TrainStream


@pytest.fixture
def server(prepared: Path) -> Iterator[HttpFiles]:
    with serve_http({path.name: path.read_bytes() for path in (prepared / "train").iterdir()}) as running:
        yield running


def settings(folder: Path, max_bytes: int = 1 << 30) -> CacheSettings:
    return CacheSettings(folder / "cache", max_bytes, patience=5.0, num_connections=2)


def gets(server: HttpFiles) -> int:
    return sum(count for (method, name), count in server.requests.items() if method == "GET" and name.endswith(".tar"))


def test_it_is_what_the_folder_is(server: HttpFiles, prepared: Path, tmp_path: Path) -> None:
    near, far = ShardDataset(prepared / "train"), ShardDataset(server.url, settings(tmp_path))
    everything = np.random.default_rng(0).permutation(len(near))
    for expected, found in zip(near.read(everything), far.read(everything), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert gets(server) == len(near.manifest.shards)
    far.close()


def test_the_smallest_cache_that_is_accepted_fetches_a_shard_once_an_epoch(server: HttpFiles, tmp_path: Path) -> None:
    window, shards = 30, ShardDataset(server.url, settings(tmp_path)).manifest.shards
    with pytest.raises(DataError, match=r"the shuffle needs .* GB .*data\.shuffle_window=30 of 203 samples.*cache_gb"):
        TrainStream(ShardDataset(server.url, settings(tmp_path, 1)), seed=0, random_flip=False, window=window)
    largest, total = max(s.num_bytes for s in shards), sum(s.num_bytes for s in shards)
    least = 2 * (int(total * window / 203) + 2 * largest)
    assert least < total  # the cache cannot hold it all
    dataset = ShardDataset(server.url, settings(tmp_path / "least", least))
    stream = TrainStream(dataset, seed=0, random_flip=False, window=window)
    server.requests.clear()
    for start in range(0, 203, 7):
        stream.batch(start, min(7, 203 - start))
    stream.close()
    # Beyond the epoch's end, the next one's first shards have begun to travel.
    assert len(shards) <= gets(server) <= 2 * len(shards)


def test_a_copy_that_was_damaged_here_is_fetched_again(server: HttpFiles, tmp_path: Path) -> None:
    far = ShardDataset(server.url, settings(tmp_path))
    everything = np.arange(len(far))
    images, labels = far.read(everything)
    for number in (0, 1):
        copy = tmp_path / "cache" / f"{far.manifest.shards[number].sha256}.tar"
        content = bytearray(copy.read_bytes())
        content[int(far.index.offset[far.index.shard == number][3]) + 60] ^= 1
        copy.write_bytes(content)
    again = ShardDataset(server.url, settings(tmp_path))
    for expected, found in zip((images, labels), again.read(everything), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert gets(server) == len(far.manifest.shards) + 2


def test_a_sample_that_was_damaged_before_is_damaged(server: HttpFiles, tmp_path: Path) -> None:
    """Its shard's checksum is right: so it was written, and fetching it again would not help."""
    far = ShardDataset(server.url, settings(tmp_path))
    object.__setattr__(far.index, "crc32", far.index.crc32 ^ (np.arange(len(far)) == 5).astype(np.uint32))
    with pytest.raises(DamagedSampleError, match=r"sample 000000005 is damaged.*inspect http://.* --verify.*Upload"):
        far.read(np.arange(10))
    assert gets(server) == 1


@pytest.mark.parametrize("content", [b"", b"x" * 1000])
def test_a_damaged_copy_of_the_index_is_fetched_again(server: HttpFiles, tmp_path: Path, content: bytes) -> None:
    described = ShardDataset(server.url, settings(tmp_path)).manifest
    (tmp_path / "cache" / f"{described.index_sha256}.index.npz").write_bytes(content)
    assert len(ShardDataset(server.url, settings(tmp_path))) == 203


def test_what_the_server_has_wrong_is_refused_at_the_start(server: HttpFiles, tmp_path: Path) -> None:
    shard, index = server.files["shard-000001.tar"], server.files["index.npz"]
    server.files["shard-000001.tar"] = shard[:-512]
    with pytest.raises(DataError, match=r"shard http://.*/shard-000001.tar has .* bytes instead of .* Upload"):
        ShardDataset(server.url, settings(tmp_path))
    del server.files["shard-000001.tar"]
    with pytest.raises(DataError, match=r"shard http://.*/shard-000001.tar is missing\. Upload"):
        ShardDataset(server.url, settings(tmp_path))
    server.files["shard-000001.tar"], server.files["index.npz"] = shard, index[:-1]
    with pytest.raises(DataError, match=r"index\.npz is damaged, or not the one .* upload both anew"):
        ShardDataset(server.url, settings(tmp_path / "other"))


def test_a_shard_that_goes_while_it_is_used_is_named(own_copy: Path, tmp_path: Path) -> None:
    data = ShardDataset(own_copy / "train")
    shutil.rmtree(own_copy)
    with pytest.raises(DataError, match=r"shard .*shard-000000.tar is missing; it was there at the start"):
        data.read(np.array([0]))
