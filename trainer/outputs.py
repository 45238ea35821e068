"""What a run leaves behind beside its checkpoints: exports, grids of samples from them, snapshots of averages."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from trainer.config.run import RunConfig
from trainer.export import open_export, write_export
from trainer.grid import save_grid
from trainer.inputs import downsample
from trainer.run_folder import RunFolder
from trainer.sampling import Stage, sample


class Outputs:
    """The main process's work."""

    def __init__(self, config: RunConfig, folder: RunFolder, dataset: ShardDataset, device: torch.device) -> None:
        self._config, self._folder, self._dataset, self._device = config, folder, dataset, device
        self._undrawn: list[Path] = []  # exports that may have no grid yet

    def export(self, checkpoint: Path) -> None:
        """Write the export of a checkpoint, where it is not there yet."""
        self._undrawn.append(write_export(checkpoint, self._folder.exports, run_id=self._folder.identity()["id"]))

    def snapshot_ema(self, checkpoint: Path) -> None:
        """Keep a checkpoint's averages of power profile for good, where they are not yet: an export of these alone."""
        train = self._config.train
        write_export(
            checkpoint, self._folder.ema_snapshots, run_id=self._folder.identity()["id"], kinds=train.profiles,
            dtype=torch.float16 if train.ema_snapshot_precision == "fp16" else torch.float32,
        )  # fmt: skip

    def draw_samples(self) -> None:
        """The grids of the exports made since. Not beside a step that is computed: they need the device."""
        grid = self._config.train.sample_grid
        while self._undrawn:
            export = self._undrawn.pop()
            picture = self._folder.samples / f"{export.name}.png"
            if not grid.num_images or picture.exists():
                continue
            network = open_export(export).network("ema").to(self._device)
            low_res, labels = self._examples(grid.num_images)
            images = sample(
                Stage.open(network, self._config, grid, self._device), range(grid.num_images),
                labels=labels, low_res=low_res, device=self._device,
            )  # fmt: skip
            save_grid(images, picture)

    def _examples(self, num_images: int) -> tuple[Tensor | None, list[int] | None]:
        """What a super-resolution network's samples start from: the data's first images, made small, and their classes.

        (None, None) for other networks.
        """
        size = self._config.model.low_res_size
        if not size:
            return None, None
        images, labels = self._dataset.read(torch.arange(num_images).numpy() % len(self._dataset))
        x0 = torch.from_numpy(images).to(self._device).float() / 127.5 - 1
        return downsample(x0, size), labels.tolist()
