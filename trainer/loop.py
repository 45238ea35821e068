"""The training loop: read it top to bottom.

The clock is `nimg`, images seen. Everything random is a function of (seed, nimg), so a run that resumes at a
checkpoint goes on as if it had never stopped. Nothing in a step waits for the device: figures are read one logging
interval late, the stop request one step late.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.dataset import ShardDataset
from data_pipeline.errors import AgreedError
from data_pipeline.progress import progress_bar, say
from trainer.averages.sharded import ShardedEma
from trainer.checkpoint import (
    CheckpointReader,
    RunState,
    Snapshot,
    checkpoint_name,
    fragment_tensors,
    newest_valid,
    remove_old,
)
from trainer.conditions import Conditions
from trainer.config.run import RunConfig
from trainer.config.tree import to_yaml
from trainer.damage import DamageWatch
from trainer.diagnosis import Recomputed, diagnose
from trainer.diffusion.gaussian import GaussianDiffusion
from trainer.diffusion.low_res_noise import LowResNoise
from trainer.diffusion.objectives import Losses, classification_losses, training_losses
from trainer.diffusion.timesteps import make_timestep_sampler
from trainer.engine import Engine, split_batch
from trainer.exits import DivergedError, Exit
from trainer.guiding import check_guide
from trainer.inputs import InputSource, downsample, open_dataset
from trainer.journal import Journal
from trainer.layout import changes, layout_of
from trainer.meter import Meter
from trainer.milestones import Milestones
from trainer.mirror import MirrorProcess
from trainer.models import ModelCost, build_model, count
from trainer.noise_scale import NoiseScale
from trainer.optimizer import learning_rate
from trainer.outputs import Outputs
from trainer.peak import peak_flops
from trainer.processes import Processes, StopAgreement, StopRequest
from trainer.profiler import StepProfiler
from trainer.run_folder import RunFolder
from trainer.saver import Saver
from trainer.step_inputs import StepInputs
from trainer.tracking.follow import SyncProcess
from trainer.tracking.records import TrainRecord
from trainer.watchdog import Watchdog


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass is of, on the device."""

    nimg: int  # where its step begins
    number: int  # within the step
    inputs: StepInputs
    t: Tensor  # [b] timesteps
    weights: Tensor  # [b] of their losses


def train(config: RunConfig, processes: Processes, stop: StopRequest, watchdog: Watchdog) -> int:
    """Train until the budget is reached or a stop is asked for; returns the exit code.

    Raises UserError for what the user can mend: unsuitable data, a folder in use, a full disk, a diverged run.
    """
    folder = RunFolder(config.run.folder)
    cost = count(config.model, config.diffusion)
    plan = Milestones.create(config, cost)
    split_batch(config, processes.world_size)
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(folder.lock()) and None)
        processes.from_main(lambda: open_dataset(config) and None)  # so that one of them tells what is wrong
        if config.train.sample_grid.num_images:
            processes.from_main(lambda: check_guide(config, config.train.sample_grid))
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
            return Exit.FINISHED
        folder.forget_result(processes.is_main)
        if processes.is_main and config.tracking.mlflow:
            sync = SyncProcess(folder.path, uri=config.tracking.uri, experiment=config.tracking.experiment)
            stack.callback(sync.stop)
        if processes.is_main and config.run.mirror:
            stack.callback(MirrorProcess(folder.path, config.run.mirror).stop)
        run = Run(config, folder, plan, cost, dataset, processes)
        stack.callback(run.close)
        return run.train(stop, watchdog)


class Run:
    """One life of a run: restored or fresh, ready to step."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, plan: Milestones, cost: ModelCost, dataset: ShardDataset,
        processes: Processes,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.plan, self.processes = config, folder, plan, processes
        self.flops_per_image, self.data_fingerprint = cost.train_flops, dataset.manifest.fingerprint
        device = processes.device
        peak, source = config.engine.peak_flops, "engine.peak_flops"
        if peak is None:
            peak, source = peak_flops(device, config.engine.precision)
        if processes.is_main:
            say(f"MFU is of {peak / 1e12:.4g} TFLOP/s a process: {source}")
        reader = self._find_checkpoint()
        torch.manual_seed(config.seed)
        network = build_model(
            config.model, config.diffusion, checkpoint_activations=config.engine.activation_checkpointing
        )
        if reader is not None:
            network.load_state_dict(dict(reader.weights("weight")), strict=True)
        self.engine = Engine(network, config, processes)
        self.ema = ShardedEma(self.engine.owned, config.train.averages)
        self.diffusion = GaussianDiffusion.create(config.diffusion, device)
        process = config.low_res_process
        self.low_res_noise = LowResNoise.create(process, device) if process else None
        self.timesteps = make_timestep_sampler(config.diffusion, device)
        self.inputs = InputSource(config, dataset, processes)
        self.damage = DamageWatch(config.data.max_damaged)
        self.meter = Meter(config, self.flops_per_image, processes, peak)
        self.noise_scale = NoiseScale(
            self.engine.network.parameters(), micro_batch=self.engine.micro_batch,
            global_batch=config.train.global_batch, accumulation=self.engine.accumulation,
        )  # fmt: skip
        self.profiler = StepProfiler(folder.path, config.engine.profile_steps, processes)
        self.saver = Saver(folder.checkpoints, processes)
        self.outputs = Outputs(config, folder, dataset, device)
        self.layout = layout_of(config, processes, micro_batch=self.engine.micro_batch)
        self.nimg, self.seconds_before, self.lr = 0, 0.0, 0.0
        self.started = False  # this life has made a step
        self.last_step: list[MicroBatch] = []
        if reader is not None:
            self._restore(reader)
        self.journal = Journal(folder.path, self.nimg, config, processes)
        self.began = time.perf_counter()

    def _find_checkpoint(self) -> CheckpointReader | None:
        path, skipped = self.processes.from_main(lambda: newest_valid(self.folder.checkpoints))
        if self.processes.is_main:
            for line in skipped:
                print(f"warning: {line}", flush=True)
            if path is not None:
                print(f"resuming at {int(path.name):,} images from {path}", flush=True)
        if path is None:
            self.processes.from_main(self.folder.check_not_emptied)
            return None
        reader = CheckpointReader(path)
        if reader.state.data_fingerprint != self.data_fingerprint:
            raise AgreedError(
                f"{path} was trained on other data than {self.config.data.train} "
                f"({reader.state.data_fingerprint} against {self.data_fingerprint}); "
                "set data.train to the former data, or choose another run.folder=..."
            )
        return reader

    def _restore(self, reader: CheckpointReader) -> None:
        reader.restore(self.engine, self.ema.shadows)
        self.timesteps.load(reader.sampler_state())
        self.nimg, self.seconds_before = reader.state.nimg, reader.state.seconds
        changed = changes(reader.state.layout, self.layout)
        if changed and self.processes.is_main:
            say(f"going on with {changed}: the same inputs, losses to rounding instead of bit for bit")
        # An earlier life may have died between the checkpoint and what is made from it.
        self.processes.from_main(lambda: self.derive(reader.path, self.nimg))

    # ---- the loop -----------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest, watchdog: Watchdog) -> int:
        config, plan, batch = self.config, self.plan, self.config.train.global_batch
        agreement = StopAgreement(self.processes)
        stop.busy = lambda: self.saver.busy
        bar = progress_bar(
            total=plan.total, unit="img", description=config.name, initial=self.nimg, disable=not self.processes.is_main
        )
        with bar, self.inputs.steps(self.nimg, plan.total, batch) as steps:
            watchdog.at(self.nimg, "data")
            for inputs in steps:
                watchdog.at(self.nimg, "compute")
                self.damage.look(inputs.damaged)
                self.meter.add_replaced(len(inputs.damaged))
                self.step(inputs)
                self.nimg += batch
                self.started = self.started or self.note_started()
                bar.update(batch)
                self.profiler.step(self.nimg)
                stopping = agreement.after_step(stop.requested or self.saver.failed) and self.nimg < plan.total
                stop.saving = stopping

                if self.nimg % plan.log_every == 0 or plan.saves(self.nimg) or stopping:
                    watchdog.at(self.nimg, "save")
                    self.log(self.close_interval(steps.wait_seconds))
                    if not stopping:
                        self.outputs.draw_samples()
                if plan.saves(self.nimg) or stopping:
                    self.log(self.meter.flush())
                    self.save()
                if stopping:
                    return self.stopped(stop)
                watchdog.at(self.nimg, "data")
        watchdog.at(self.nimg, "save")
        stop.saving = True
        self.finish(stop)
        return Exit.FINISHED

    def step(self, inputs: StepInputs) -> None:
        """One update from this process's share of a global batch, which begins at image nimg."""
        self.lr = learning_rate(self.config.train, self.nimg, self.plan.total)
        self.last_step = []
        each: list[Tensor] = []
        total = torch.zeros((), device=self.processes.device)
        scale = self.engine.loss_scale.value if self.engine.loss_scale else None
        with self.noise_scale.watch(measure=self.nimg % self.plan.log_every == 0, loss_scale=scale):
            for number, micro in enumerate(inputs.split(self.engine.micro_batch)):
                on_device = micro.to(self.processes.device)
                self.last_step.append(MicroBatch(self.nimg, number, on_device, *self.timesteps.draw(on_device.u)))
                loss, losses = self.micro_step(self.last_step[-1])
                total += loss / self.engine.accumulation
                each.append(losses)
        self.update_timesteps(torch.cat([micro.t for micro in self.last_step]), torch.cat(each))
        self.ema.update(self.nimg // self.config.train.global_batch)
        small_square = self.noise_scale.small_square()
        if small_square is not None:
            self.meter.add_noise(small_square, self.engine.adam.grad_norm)
        self.meter.add_step(total, self.engine.adam.grad_norm, self.engine.adam.skipped)

    def losses(self, micro: MicroBatch) -> Losses:
        """The forward pass: a micro-batch's losses [b]."""
        model, inputs, t = self.config.model, micro.inputs, micro.t
        if model.dropout > 0:
            torch.manual_seed(hash((self.config.seed, micro.nimg, self.processes.rank, micro.number)) % 2**63)
        x0 = inputs.images.float() / 127.5 - 1  # [b, C, H, W] in [-1, 1]
        x_t = self.diffusion.q_sample(x0, t, inputs.noise)
        with self.meter.forward():
            output = self.engine.forward(x_t, self.diffusion.network_time(t), self.conditions(x0, inputs))
        if self.config.is_classifier:
            return classification_losses(output, inputs.labels)
        return training_losses(
            self.diffusion, self.config.diffusion, output, x0=x0, x_t=x_t, t=t, noise=inputs.noise
        )  # fmt: skip

    def conditions(self, x0: Tensor, inputs: StepInputs) -> Conditions:
        """What the network is told of images x0 [b, C, H, W] beside x_t and its time."""
        model = self.config.model
        labels = inputs.labels if model.hears_classes else None
        if not model.low_res_size:
            return Conditions(labels)
        low_res = downsample(x0, model.low_res_size)
        if self.low_res_noise is None:
            return Conditions(labels, low_res)
        step, noise = inputs.low_res_step, inputs.low_res_noise
        assert step is not None
        assert noise is not None
        return Conditions(labels, self.low_res_noise.add(low_res, step, noise), self.low_res_noise.time(step))

    def micro_step(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Forward, backward and, at the last of a step, the update; returns the mean loss and the losses [b]."""
        losses = self.losses(micro)
        loss = (losses.loss * micro.weights).mean()
        self.engine.backward(loss)
        self.engine.step(self.lr)
        self.meter.add_losses(micro.t, micro.weights, losses)
        return loss.detach(), losses.loss.detach()

    def update_timesteps(self, t: Tensor, losses: Tensor) -> None:
        """Tell the timestep sampler what all processes saw, in order of global position."""
        if self.timesteps.needs_losses:
            self.timesteps.update(self.processes.all_gather_flat(t), self.processes.all_gather_flat(losses))

    # ---- what it leaves behind ----------------------------------------------------------------------------------

    def close_interval(self, wait_seconds: float) -> TrainRecord | None:
        scale = self.engine.loss_scale
        return self.meter.close_interval(
            self.nimg, wait_seconds=wait_seconds, lr=self.lr, warmed_up=self.timesteps.warmed_up_share(),
            skips_in_a_row=self.engine.adam.skips_in_a_row, loss_scale=scale.value if scale else None,
        )  # fmt: skip

    def log(self, record: TrainRecord | None) -> None:
        """Write down an interval. Raises DivergedError where too many steps in a row were skipped."""
        if record is None:
            return
        self.journal.write(record)
        skipped = record.values["train/skipped_in_a_row"]
        if skipped >= self.config.train.max_skipped_steps:
            weights = [(f.name, f.weight) for f in self.engine.owned]
            why = diagnose(self.engine.network, self._repeat_last_step, weights, self.processes)
            raise DivergedError(
                f"{skipped:.0f} steps in a row, up to {record.nimg:,} images, gave no finite loss or gradient and "
                f"were skipped (train.max_skipped_steps={self.config.train.max_skipped_steps}): {why}. The checkpoints "
                "hold what was good. Start again in a new run.folder with a lower train.lr, a longer "
                "train.warmup_images or train.grad_clip=1."
            )

    def _repeat_last_step(self) -> Recomputed:
        """Its forward and backward passes once more, for the diagnosis."""
        losses = []
        for micro in self.last_step:
            result = self.losses(micro)
            self.engine.backward((result.loss * micro.weights).mean())
            losses.append(result.loss.detach())
        t = torch.cat([micro.t for micro in self.last_step]).cpu()
        first = self.last_step[0].nimg + self.processes.rank * len(t)
        return Recomputed(t, torch.arange(first, first + len(t)), torch.cat(losses).cpu())

    def note_started(self) -> bool:
        """After the first step of a life: say so in a file. True, whether it could be written or not.

        Nothing of the run is in it, so a full disk is told by what needs the space, a record or a checkpoint.
        """
        if self.processes.is_main:
            if self.processes.device.type == "cuda":
                torch.cuda.synchronize(self.processes.device)  # the step is done, not only begun
            try:
                self.folder.write_started(self.nimg)
            except OSError as error:
                say(f"warning: {self.folder.started} could not be written ({error}); training goes on")
        return True

    def save(self) -> None:
        """Begin a checkpoint, and what the plan has made from it; all is written while training goes on."""
        train, nimg = self.config.train, self.nimg

        def then(path: Path) -> None:
            self.folder.note_saved(nimg)
            self.derive(path, nimg)
            remove_old(self.folder.checkpoints, train.keep_checkpoints, every=train.keep_every_images)

        fragments = fragment_tensors(self.engine.owned, self.ema.shadows)
        live = Snapshot(self._state(), self.engine.shapes, fragments, self.timesteps.state(), to_yaml(self.config))
        self.saver.save(live, then)

    def derive(self, checkpoint: Path, nimg: int) -> None:
        """What the plan has made from this checkpoint. Main process only."""
        if nimg in self.plan.exports:
            self.outputs.export(checkpoint)
        if self.plan.snapshots(nimg):
            self.outputs.snapshot_ema(checkpoint)

    def _state(self) -> RunState:
        seconds = self.seconds_before + time.perf_counter() - self.began
        return RunState(
            nimg=self.nimg,
            num_updates=self.engine.num_updates,
            compute=self.nimg * self.flops_per_image,
            seconds=seconds,
            data_fingerprint=self.data_fingerprint,
            layout=self.layout,
            loss_scale=self.engine.loss_scale.get() if self.engine.loss_scale else None,
        )

    def stopped(self, stop: StopRequest) -> int:
        self.saver.wait()
        if self.processes.is_main:
            why = stop.reason or "another process was asked to stop"
            say(f"stopped ({why}) at {self.nimg:,} images, saved. The same command continues.")
        return Exit.STOPPED

    def finish(self, stop: StopRequest) -> None:
        """Wait for the last checkpoint and export, and write the result file: the run is complete."""
        self.saver.wait()
        if not self.processes.is_main:
            return
        if not stop.requested:
            self.outputs.draw_samples()
        seconds = self._state().seconds
        self.folder.write_result(
            {
                "status": "complete",
                "nimg": self.nimg,
                "compute": self.nimg * self.flops_per_image,
                "seconds": seconds,
                "export": str((self.folder.exports / checkpoint_name(self.nimg)).relative_to(self.folder.path)),
            }
        )
        print(f"finished: {self.nimg:,} images in {seconds:,.0f} s of training; see {self.folder.path}", flush=True)

    def close(self) -> None:
        self.inputs.close()
        self.profiler.close(self.nimg)
        self.saver.close()
        self.journal.close()
