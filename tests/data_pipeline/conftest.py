"""Small generated data sets for the tests of the data pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.dataset import ShardDataset
from data_pipeline.prepare import prepare
from data_pipeline.sources.generated import Generated

SMALL = Generated(size=8, num_train=203, num_test=20, num_classes=3, seed=5)


@pytest.fixture(scope="session")
def small_source() -> Generated:
    """The source of `prepared`."""
    return SMALL


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 203 + 20 images in several uneven shards. Read only: tests that damage it take `own_copy`."""
    out = tmp_path_factory.mktemp("data") / "generated"
    prepare(SMALL, out, shard_mb=0.06)
    return out


@pytest.fixture(scope="session")
def small_npy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, stored raw. Read only."""
    out = tmp_path_factory.mktemp("data") / "raw"
    prepare(SMALL, out, shard_mb=0.06, encoding="npy")
    return out


@pytest.fixture
def own_copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture(scope="session")
def dataset(prepared: Path) -> ShardDataset:
    """Its training split."""
    loaded = ShardDataset(prepared / "train")
    assert len(loaded.manifest.shards) >= 3
    assert len({shard.num_samples for shard in loaded.manifest.shards}) > 1  # uneven
    return loaded
