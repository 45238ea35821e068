"""The training loop: read it top to bottom.

The clock is `nimg`, images seen. Everything random is a function of (seed, nimg), so a run that resumes at a
checkpoint goes on as if it had never stopped. Nothing in a step waits for the device: figures are read one logging
interval late, the stop request one step late.
"""

from __future__ import annotations

import platform
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import AgreedError
from data_pipeline.progress import progress_bar
from trainer.checkpoint import CheckpointReader, RunState, newest_valid, remove_old, save_checkpoint
from trainer.config import RunConfig, to_yaml
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.objectives import training_losses
from trainer.diffusion.timesteps import make_timestep_sampler
from trainer.ema import ShardedEma
from trainer.engine import Engine, split_batch
from trainer.export import open_export, write_export
from trainer.grid import save_grid
from trainer.inputs import InputSource, StepInputs, open_dataset
from trainer.meter import Meter, is_finite
from trainer.models import ModelCost, build_model, count
from trainer.processes import Processes, StopAgreement, StopRequest
from trainer.run_folder import RunFolder
from trainer.sampling import Stage, sample
from trainer.tracking.follow import SyncProcess
from trainer.tracking.records import RecordWriter, TrainRecord

FINISHED, STOPPED = 0, 3  # exit codes


@dataclass(frozen=True)
class Plan:
    """When the run does what, in images seen; all multiples of the global batch."""

    total: int
    log_every: int
    checkpoint_every: int | None
    exports: frozenset[int]

    @classmethod
    def create(cls, config: RunConfig, cost: ModelCost) -> Plan:
        """A budget of FLOPs becomes images, and every moment is moved up to the end of its step."""
        train = config.train

        def step_end(images: float) -> int:
            return max(1, -(-int(images) // train.global_batch)) * train.global_batch

        total = step_end(train.budget_images or max(1.0, (train.budget_flops or 0.0) / cost.train_flops))
        every = train.checkpoint_every_images
        exports = {step_end(n) for n in train.export_images if step_end(n) <= total} | {total}
        return cls(total, step_end(train.log_every_images), step_end(every) if every else None, frozenset(exports))

    def saves(self, nimg: int) -> bool:
        return nimg in self.exports or (self.checkpoint_every is not None and nimg % self.checkpoint_every == 0)


def train(config: RunConfig, processes: Processes, stop: StopRequest) -> int:
    """Train until the budget is reached or a stop is asked for; returns the exit code.

    Raises UserError for what the user can mend: unsuitable data, a folder in use, a full disk, a diverged run.
    """
    folder = RunFolder(config.run.folder)
    cost = count(config.model, config.diffusion)
    plan = Plan.create(config, cost)
    split_batch(config, processes.world_size)
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(folder.lock()) and None)
        processes.from_main(lambda: open_dataset(config) and None)  # so that one of them tells what is wrong
        dataset = open_dataset(config)
        facts = {
            "num_params": cost.num_params, "flops_per_image": cost.train_flops,
            "data_fingerprint": dataset.manifest.fingerprint,
        }  # fmt: skip
        processes.from_main(lambda: folder.open(config, facts))
        result = folder.read_result()
        if result is not None and result["nimg"] >= plan.total:
            if processes.is_main:
                print(f"{folder.path}: finished already, {result['nimg']:,} images seen; nothing to do.")
            return FINISHED
        folder.forget_result(processes.is_main)
        if processes.is_main and config.tracking.mlflow:
            sync = SyncProcess(folder.path, uri=config.tracking.uri, experiment=config.tracking.experiment)
            stack.callback(sync.stop)
        run = Run(config, folder, plan, cost, dataset, processes)
        stack.callback(run.close)
        return run.train(stop)


class Run:
    """One life of a run: restored or fresh, ready to step."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, plan: Plan, cost: ModelCost, dataset: ShardDataset,
        processes: Processes,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.plan, self.processes, self.dataset = config, folder, plan, processes, dataset
        self.flops_per_image = cost.train_flops
        device = processes.device
        reader = self._find_checkpoint()
        torch.manual_seed(config.seed)
        network = build_model(
            config.model, config.diffusion, checkpoint_activations=config.engine.activation_checkpointing
        )
        if reader is not None:
            network.load_state_dict(dict(reader.weights("weight")), strict=True)
        self.engine = Engine(network, config, processes)
        self.ema = ShardedEma(self.engine.owned, config.train.ema_decay)
        self.diffusion = GaussianDiffusion.create(config.diffusion, device)
        self.timesteps = make_timestep_sampler(config.diffusion, device)
        self.inputs = InputSource(config, dataset, processes)
        self.meter = Meter(config.diffusion.num_timesteps, self.flops_per_image, processes)
        self.nimg, self.seconds_before, self.lr = 0, 0.0, 0.0
        if reader is not None:
            reader.restore(self.engine, self.ema.shadows)
            self.timesteps.load(reader.sampler_state())
            self.nimg, self.seconds_before = reader.state.nimg, reader.state.seconds
            if self.nimg in plan.exports:  # an earlier life may have died between the checkpoint and its export
                processes.from_main(lambda: self._export(reader.path))
        self.records = RecordWriter(folder.path, self.nimg) if processes.is_main else None
        self.began = time.perf_counter()

    def _find_checkpoint(self) -> CheckpointReader | None:
        path, skipped = self.processes.from_main(lambda: newest_valid(self.folder.checkpoints))
        if self.processes.is_main:
            for line in skipped:
                print(f"warning: {line}", flush=True)
            if path is not None:
                print(f"resuming at {int(path.name):,} images from {path}", flush=True)
        if path is None:
            return None
        reader = CheckpointReader(path)
        if reader.state.data_fingerprint != self.dataset.manifest.fingerprint:
            raise AgreedError(
                f"{path} was trained on other data than {self.config.data.train} "
                f"({reader.state.data_fingerprint} against {self.dataset.manifest.fingerprint}); "
                "set data.train to the former data, or choose another run.folder=..."
            )
        return reader

    # ---- the loop -----------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> int:
        config, plan, batch = self.config, self.plan, self.config.train.global_batch
        agreement = StopAgreement(self.processes)
        bar = progress_bar(
            total=plan.total, unit="img", description=config.name, initial=self.nimg, disable=not self.processes.is_main
        )
        with bar, self.inputs.steps(self.nimg, plan.total, batch) as steps:
            for inputs in steps:
                self.step(inputs)
                bar.update(batch)
                stopping = agreement.after_step(stop.requested) and self.nimg < plan.total

                if self.nimg % plan.log_every == 0 or plan.saves(self.nimg) or stopping:
                    self.log(self.meter.close_interval(
                        self.nimg, wait_seconds=steps.wait_seconds, lr=self.lr,
                        warmed_up=self.timesteps.warmed_up_share(),
                    ))  # fmt: skip
                stop.saving = stopping
                if plan.saves(self.nimg) or stopping:
                    self.save()
                if stopping:
                    return self.stopped(stop)
        self.finish()
        return FINISHED

    def step(self, inputs: StepInputs) -> None:
        """One update from this process's share of a global batch."""
        self.lr = self.learning_rate()
        drawn: list[Tensor] = []
        losses: list[Tensor] = []
        total = torch.zeros((), device=self.processes.device)
        for number, micro in enumerate(inputs.split(self.engine.micro_batch)):
            if self.config.model.dropout > 0:
                self._seed_dropout(number)
            t, loss, unweighted = self.micro_step(micro.to(self.processes.device))
            drawn.append(t)
            losses.append(unweighted)
            total += loss / self.engine.accumulation
        self.timesteps_update(torch.cat(drawn), torch.cat(losses))
        self.ema.update(self.nimg // self.config.train.global_batch)
        self.meter.add_step(total, self.engine.grad_norm())
        self.nimg += self.config.train.global_batch

    def micro_step(self, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Forward, backward and, at the last of a step, the update; returns t [b], mean loss, losses [b]."""
        model = self.config.model
        x0 = inputs.images.float() / 127.5 - 1  # [b, C, H, W] in [-1, 1]
        t, weights = self.timesteps.draw(inputs.u)
        x_t = self.diffusion.q_sample(x0, t, inputs.noise)
        output = self.engine.forward(
            x_t,
            self.diffusion.network_time(t),
            inputs.labels if model.num_classes else None,
            downsample(x0, model.low_res_size) if model.low_res_size else None,
        )
        losses = training_losses(
            self.diffusion, self.config.diffusion, output, x0=x0, x_t=x_t, t=t, noise=inputs.noise
        )  # fmt: skip
        loss = (losses.loss * weights).mean()
        self.engine.backward(loss)
        self.engine.step(self.lr)
        self.meter.add_losses(t, weights, losses)
        return t, loss.detach(), losses.loss.detach()

    def timesteps_update(self, t: Tensor, losses: Tensor) -> None:
        """Tell the timestep sampler what all processes saw, in order of global position."""
        if self.timesteps.needs_losses:
            self.timesteps.update(self.processes.all_gather_flat(t), self.processes.all_gather_flat(losses))

    def learning_rate(self) -> float:
        """The rate of the step that begins at nimg: a linear warm-up, then constant."""
        train = self.config.train
        if not train.warmup_images:
            return train.lr
        return train.lr * min(1.0, (self.nimg + train.global_batch) / train.warmup_images)

    def _seed_dropout(self, micro_batch: int) -> None:
        place = (self.nimg, self.processes.rank, micro_batch)
        torch.manual_seed(hash((self.config.seed, *place)) % 2**63)

    # ---- what it leaves behind ----------------------------------------------------------------------------------

    def log(self, record: TrainRecord | None) -> None:
        if record is None:
            return
        if self.records is not None:
            self.records.write(record)
        if not is_finite(record):
            raise AgreedError(
                f"the loss is no longer finite at {record.nimg:,} images (loss {record.values['train/loss']}, gradient "
                f"norm {record.values['train/grad_norm']}). The checkpoints before it are kept. Start again in a new "
                "run.folder with a lower train.lr, a longer train.warmup_images or train.grad_clip=1."
            )

    def save(self) -> None:
        """A checkpoint, and an export and samples where the plan has one."""
        self.log(self.meter.flush())
        path = save_checkpoint(
            self.folder.checkpoints,
            engine=self.engine,
            ema=self.ema.shadows,
            sampler_state=self.timesteps.state(),
            state=self._state(),
            config_yaml=to_yaml(self.config),
            processes=self.processes,
        )
        if self.nimg in self.plan.exports:
            self.processes.from_main(lambda: self._export(path))
        if self.processes.is_main:
            remove_old(self.folder.checkpoints, self.config.train.keep_checkpoints)

    def _state(self) -> RunState:
        seconds = self.seconds_before + time.perf_counter() - self.began
        return RunState(
            nimg=self.nimg,
            num_updates=self.engine.num_updates,
            compute=self.nimg * self.flops_per_image,
            seconds=seconds,
            data_fingerprint=self.dataset.manifest.fingerprint,
            layout=self._layout(),
        )

    def _layout(self) -> dict[str, Any]:
        return {
            "num_processes": self.processes.world_size,
            "num_threads": torch.get_num_threads(),
            "micro_batch": self.engine.micro_batch,
            "zero_stage": self.engine.stage,
            "precision": self.config.engine.precision,
            "device": self.processes.device.type,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def _export(self, checkpoint: Path) -> None:
        """Write the export of a checkpoint and its grid, where they are not there yet."""
        export = write_export(checkpoint, self.folder.exports, run_id=self.folder.identity()["id"])
        grid, picture = self.config.train.sample_grid, self.folder.samples / f"{export.name}.png"
        if grid.num_images and not picture.exists():
            network = open_export(export).network("ema").to(self.processes.device)
            low_res, labels = self._examples(grid.num_images)
            images = sample(
                Stage(network, self.config, grid), range(grid.num_images),
                labels=labels, low_res=low_res, device=self.processes.device,
            )  # fmt: skip
            save_grid(images, picture)

    def _examples(self, num_images: int) -> tuple[Tensor | None, list[int] | None]:
        """What a super-resolution network's samples start from: the data's first images, made small, and their classes.

        (None, None) for other networks.
        """
        size = self.config.model.low_res_size
        if not size:
            return None, None
        images, labels = self.dataset.read(torch.arange(num_images).numpy() % len(self.dataset))
        x0 = torch.from_numpy(images).to(self.processes.device).float() / 127.5 - 1
        return downsample(x0, size), labels.tolist()

    def stopped(self, stop: StopRequest) -> int:
        if self.processes.is_main:
            why = stop.reason or "another process was asked to stop"
            print(f"\nstopped ({why}) at {self.nimg:,} images, saved. The same command continues.", flush=True)
        return STOPPED

    def finish(self) -> None:
        """Write the result file: the run is complete."""
        if not self.processes.is_main:
            return
        seconds = self._state().seconds
        self.folder.write_result(
            {
                "status": "complete",
                "nimg": self.nimg,
                "compute": self.nimg * self.flops_per_image,
                "seconds": seconds,
                "export": str((self.folder.exports / f"{self.nimg:012d}").relative_to(self.folder.path)),
            }
        )
        print(f"finished: {self.nimg:,} images in {seconds:,.0f} s of training; see {self.folder.path}", flush=True)

    def close(self) -> None:
        self.inputs.close()
        if self.records is not None:
            self.records.close()


def downsample(x0: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] area-averaged to [B, C, size, size]: the upsampler's condition."""
    return F.interpolate(x0, (size, size), mode="area")
