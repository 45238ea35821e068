"""All that a training step consumes, made ahead of it on the host.

Images, flips, timestep draws and noise are pure functions of (seed, image number): a process makes its own slice of
the global batch, and the slices of all processes are always the same batch. Noise is drawn on the host, in the
prefetching thread: so its bits do not depend on the device either.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.counter_rng import Stream, generator, normal, uniform
from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import ConfigError
from data_pipeline.prefetch import Prefetcher
from data_pipeline.shard_cache import CacheSettings, default_folder
from data_pipeline.stream import TrainStream
from trainer.config.run import RunConfig
from trainer.input_workers import WorkerSteps
from trainer.processes import Processes
from trainer.step_inputs import StepInputs

NO_LABEL = -1


class InputSource:
    """Makes the inputs of the step that begins at any image number."""

    def __init__(self, config: RunConfig, dataset: ShardDataset, processes: Processes) -> None:
        self._config, self._dataset, self._processes = config, dataset, processes
        self._seed = config.seed
        self._global_batch = config.train.global_batch
        self._share = self._global_batch // processes.world_size
        self._offset = processes.rank * self._share
        self._pin = processes.device.type == "cuda"
        self._class_dropout = config.train.class_dropout
        self._stratified = config.diffusion.timestep_sampler == "stratified"
        data = config.data
        self._stream = TrainStream(
            dataset, seed=config.seed, random_flip=data.random_flip, num_threads=data.num_threads,
            window=data.shuffle_window, on_damage=data.on_damage,
        )  # fmt: skip

    def make(self, nimg: int) -> StepInputs:
        """This process's share of the global batch nimg .. nimg + global_batch - 1."""
        start = nimg + self._offset
        batch = self._stream.batch(start, self._share)
        arrays = {
            "images": batch.images,
            "labels": self._drop_labels(batch.labels, start),
            "u": self._timestep_numbers(nimg),
            "noise": normal(self._seed, Stream.NOISE, start, self._share, batch.images.shape[1:]),
            **self._low_res_noise(start, num_channels=batch.images.shape[1]),
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        inputs = StepInputs(**tensors, damaged=batch.damaged)
        return inputs.pin_memory() if self._pin else inputs

    def _low_res_noise(self, start: int, *, num_channels: int) -> dict[str, NDArray[Any]]:
        """What makes the low-resolution images of the images start, ... noisy; nothing where they are not to be."""
        model = self._config.model
        if model.low_res_noise is None:
            return {}
        u = uniform(self._seed, Stream.LOW_RES_STEP, start, self._share)
        shape = (num_channels, model.low_res_size, model.low_res_size)
        return {
            "low_res_step": (u * (model.low_res_noise.max_step + 1)).astype(np.int64),
            "low_res_noise": normal(self._seed, Stream.LOW_RES_NOISE, start, self._share, shape),
        }

    def _drop_labels(self, labels: NDArray[np.int64], start: int) -> NDArray[np.int64]:
        """Labels [b] of the images start, ..., a share of them replaced by "none"."""
        if not self._class_dropout:
            return labels
        dropped = uniform(self._seed, Stream.CLASS_DROPOUT, start, len(labels)) < self._class_dropout
        return np.where(dropped, NO_LABEL, labels)

    def _timestep_numbers(self, nimg: int) -> NDArray[np.float64]:
        """The numbers in [0, 1) that decide this process's timesteps: [b]."""
        u = uniform(self._seed, Stream.TIMESTEP, nimg + self._offset, self._share)
        if not self._stratified:
            return u
        # Each image of the global batch has one of its equal parts of [0, 1), in an order drawn anew every step.
        strata = generator(self._seed, Stream.STRATUM, nimg).permutation(self._global_batch)
        return (strata[self._offset : self._offset + self._share] + u) / self._global_batch

    def steps(self, first: int, last: int, step: int) -> Prefetcher[StepInputs] | WorkerSteps:
        """Inputs of the steps that begin at first, first + step, ... below last, made ahead."""
        data, starts = self._config.data, range(first, last, step)
        if not data.num_workers:
            return Prefetcher(self.make, starts, depth=data.prefetch)
        there = replace(self._processes, device=torch.device("cpu"))  # a worker touches no device
        maker = partial(InputSource, self._config, self._dataset, there)
        return WorkerSteps(maker, starts, num_workers=data.num_workers, prefetch=data.prefetch, pin=self._pin)

    def close(self) -> None:
        self._stream.close()


def downsample(x0: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] area-averaged to [B, C, size, size]: the upsampler's condition."""
    return F.interpolate(x0, (size, size), mode="area")


def open_dataset(config: RunConfig) -> ShardDataset:
    """The training split, checked against the network. Raises ConfigError or DataError."""
    remote = config.data.remote
    cache = CacheSettings(
        folder=remote.cache or default_folder(), max_bytes=int(remote.cache_gb * 1e9), patience=remote.patience,
        num_connections=remote.connections,
    )  # fmt: skip
    dataset = ShardDataset(config.data.train, cache)
    manifest = dataset.manifest
    if manifest.image_size != config.model.image_size:
        raise ConfigError(
            f"model.image_size={config.model.image_size}, but the images in {config.data.train} are "
            f"{manifest.image_size}x{manifest.image_size}; prepare them at the network's size, or change the config."
        )
    if config.model.num_classes and manifest.num_classes != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes={config.model.num_classes}, but {config.data.train} has {manifest.num_classes} "
            f"classes; {_remedy(config, manifest.num_classes)}."
        )
    if config.model.num_classes and not config.model.null_class:
        _check_labels(dataset, config.model.num_classes)
    return dataset


def _remedy(config: RunConfig, num_classes: int) -> str:
    """What to do about a split with another number of classes."""
    if not config.is_classifier:
        return "set it to that, or to 0 for an unconditional network"
    return "set it to that" if num_classes > 1 else "a classifier learns from labels: prepare the data with its classes"


def _check_labels(dataset: ShardDataset, num_classes: int) -> None:
    """Raises ConfigError where an image has no class of the split's."""
    labels = dataset.index.label
    unknown = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(unknown):
        raise ConfigError(
            f"model.num_classes={num_classes}, but {len(unknown):,} of the {len(dataset):,} images in {dataset.place} "
            f"have no such class (the first is number {unknown[0]}, with label {labels[unknown[0]]}); prepare the data "
            "with the class of every image, or train a network that need not know it (model.null_class=true)."
        )
