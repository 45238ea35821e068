"""DeepSpeed behind four verbs: forward, backward, step, and the fragments of the state this process owns.

Nothing else in the project knows DeepSpeed. It sees a float32 network at every precision: bf16 and fp16 are torch's
autocast around the network's forward. So gradients are accumulated and reduced in float32, and a fragment of the
weights is the master copy itself and not an image of it.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.conditions import Conditions
from trainer.config.run import RunConfig
from trainer.deepspeed_settings import deepspeed_settings
from trainer.optimizer import GuardedAdamW, LossScale
from trainer.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")
# It warns of optimizers that it does not know; ours is torch's with a guard.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
# DeepSpeed still uses names that the newest torch renames.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+_tensor.* is deprecated")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one parameter's elements, as live views of the engine's tensors."""

    name: str
    offset: int  # of its first element within the flattened parameter
    weight: Tensor  # [n] float32, the master copy
    moments: dict[str, Tensor]  # by Adam's names, each [n]

    def __len__(self) -> int:
        return self.weight.numel()

    def narrow(self, start: int, length: int) -> Fragment:
        moments = {kind: m.narrow(0, start, length) for kind, m in self.moments.items()}
        return Fragment(self.name, self.offset + start, self.weight.narrow(0, start, length), moments)


class Engine:
    """One network under DeepSpeed."""

    def __init__(self, network: nn.Module, config: RunConfig, processes: Processes) -> None:
        """`network` must hold the weights to start from: they become the master copies as they are."""
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        deepspeed.utils.logger.setLevel(logging.WARNING)
        self.processes = processes
        self.stage = config.engine.zero_stage
        self.micro_batch, self.accumulation = split_batch(config, processes.world_size)
        self.shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        self._channels_last = config.engine.channels_last
        device = processes.device
        network.to(device)
        if config.engine.precision in DTYPES:
            network.forward = torch.autocast(device.type, DTYPES[config.engine.precision])(network.forward)
        self.loss_scale = LossScale.create(config.engine, device)
        self.adam = GuardedAdamW(
            network.parameters(), grad_clip=config.train.grad_clip, loss_scale=self.loss_scale, device=device,
            lr=config.train.lr, betas=config.train.betas, weight_decay=config.train.weight_decay,
        )  # fmt: skip
        settings = deepspeed_settings(
            config, device, micro_batch=self.micro_batch, accumulation=self.accumulation,
            num_params=sum(p.numel() for p in network.parameters()),
        )  # fmt: skip
        try:
            self._engine, *_ = deepspeed.initialize(
                model=network, optimizer=self.adam, config=settings, dist_init_required=False
            )
        except (ValueError, TypeError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
            if not config.engine.deepspeed:
                raise
            raise ConfigError(
                f"engine.deepspeed={config.engine.deepspeed!r}: DeepSpeed cannot work with these settings ({error}); "
                "mend them, or leave them out."
            ) from error
        self.adam.sum_squares_with(self._sum_over_processes)
        self._create_moments()
        self.held = self._held_fragments()  # what this process must load
        self.owned = self._owned_fragments()  # what it must save: every element has exactly one owner
        if config.engine.compile:
            self._engine.compile()

    def _sum_over_processes(self, squares: Tensor) -> Tensor:
        # Without ZeRO everybody has all gradients, reduced already; else only its own part of them.
        own = squares / self.processes.world_size if self.stage == 0 else squares
        return self.processes.all_reduce_sum(own)

    # ---- a step -------------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """The network itself; under ZeRO-3 its parameters are whole only within a forward or backward pass."""
        module: nn.Module = self._engine.module
        return module

    def forward(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The network's output in float32: [B, out_channels, H, W], or a classifier's logits [B, num_classes]."""
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        output: Tensor = self._engine(x, time, *conditions)
        return output.float()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""
        self.adam.watch_loss(loss)
        self._engine.backward(loss * self.loss_scale.value if self.loss_scale else loss)

    def step(self, lr: float) -> None:
        """End a micro-batch; at the last of a step, reduce, clip and update with this learning rate.

        What came of it is in `adam`: grad_norm, skipped, skips_in_a_row.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        last = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if last and not self.adam.stepped:  # ZeRO-3 and offloading check the gradient themselves
            self.adam.skip()
        self.adam.stepped = False

    # ---- the state ----------------------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Adam's step count."""
        return int(next(iter(self.adam.state.values()))["step"])

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(value)

    def _create_moments(self) -> None:
        """Adam makes its state at the first step; made here, it can be restored and looked at before that."""
        for flat in self._flat_masters():
            self.adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that Adam itself updates: parameters at stage 0, flat partitions above."""
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.adam.param_groups for p in group["params"]]

    def _held_fragments(self) -> list[Fragment]:
        parameters = list(self._engine.module.named_parameters())
        if self.stage == 0:
            return [self._fragment(name, 0, p, 0, p.numel()) for name, p in parameters]
        find = self._partition_stage3 if self.stage == 3 else self._partition_stage12
        return [fragment for name, p in parameters if (fragment := find(name, p)) is not None]

    def _owned_fragments(self) -> list[Fragment]:
        if self.stage > 0:
            return self.held
        rank, world = self.processes.rank, self.processes.world_size
        owned = []
        for fragment in self.held:
            start, end = len(fragment) * rank // world, len(fragment) * (rank + 1) // world
            if end > start:
                owned.append(fragment.narrow(start, end - start))
        return owned

    def _partition_stage12(self, name: str, parameter: Any) -> Fragment | None:
        mapping = parameter._hp_mapping  # None where this process owns no part
        if mapping is None:
            return None
        flat = self._engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        where = mapping.get_hp_fragment_address()
        return self._fragment(name, mapping.lp_fragment_address.start, flat, where.start, where.numel)

    def _partition_stage3(self, name: str, parameter: Any) -> Fragment | None:
        zero = self._engine.optimizer
        group, start, padded = zero.grad_position[zero.get_param_id(parameter)]
        offset = padded * self.processes.rank  # equal slices, the last ones padded or empty
        length = min(padded, parameter.ds_numel - offset)
        if length <= 0:
            return None
        return self._fragment(name, offset, zero.fp32_partitioned_groups_flat[group], start, length)

    def _fragment(self, name: str, offset: int, flat: Tensor, start: int, length: int) -> Fragment:
        state = self.adam.state[flat]
        moments = {kind: state[kind].view(-1).narrow(0, start, length) for kind in MOMENTS}
        return Fragment(name, offset, flat.detach().view(-1).narrow(0, start, length), moments)


def split_batch(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(micro-batch of a process, accumulation steps) for the global batch.

    Raises ConfigError where the global batch cannot be divided so.
    """
    batch = config.train.global_batch
    if batch % world_size:
        fitting = [n for n in range(1, min(batch, 4 * world_size) + 1) if batch % n == 0]
        raise ConfigError(
            f"train.global_batch={batch} cannot be divided among {world_size} processes; "
            f"use one of {fitting} processes, or a batch that is a multiple of {world_size}."
        )
    share = batch // world_size
    micro = config.train.micro_batch or share
    micro = min(micro, share)
    if share % micro:
        raise ConfigError(
            f"train.micro_batch={micro} does not divide a process's share of the batch, {share} "
            f"(train.global_batch={batch} over {world_size} processes)."
        )
    return micro, share // micro
