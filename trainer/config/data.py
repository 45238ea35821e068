"""Where the images come from: what a config says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from trainer.config.section import Place, Section


class RemoteConfig(Section):
    """Shards at a URL are read through a cache on the local disk, which all processes of a machine share."""

    cache: Path | None = None  # its folder; default: ~/.cache/diffusion-scaling/shards
    cache_gb: float = Field(64.0, gt=0)  # what it may hold; the least recently used shards go first
    patience: float = Field(120.0, gt=0)  # seconds without a byte, retries included, after which the run gives up
    connections: int = Field(4, ge=1, le=64)  # downloads at a time, a process


class DataConfig(Section):
    train: Place = Field(description="folder or URL of the training split's shards")
    random_flip: bool = True  # mirror half of the images, chosen by (seed, image number)
    shuffle_window: int = Field(1 << 18, ge=1)  # samples: how far one may move from its shard's place in the epoch
    num_threads: int = Field(1, ge=1, le=64)  # that decode one batch
    num_workers: int = Field(0, ge=0, le=64)  # processes that make batches; 0: a thread of the training process
    prefetch: int = Field(2, ge=1, le=64)  # batches kept ready ahead of the training step
    on_damage: Literal["error", "replace"] = "error"  # a damaged sample ends the run, or another takes its place
    max_damaged: int = Field(100, ge=1)  # damaged samples that a process replaces, from start to stop
    remote: RemoteConfig = RemoteConfig()
