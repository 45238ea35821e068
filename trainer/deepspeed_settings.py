"""DeepSpeed's settings from ours, and those that a user adds in DeepSpeed's own words.

Only trainer/engine.py reads what is made here.
"""

from __future__ import annotations

from typing import Any

import torch

from data_pipeline.errors import ConfigError
from trainer.config import RunConfig

Settings = dict[str, Any]

# What the contracts rest on (float32 masters, our optimizer, our checkpoints), or what our own keys say: the remedy.
_REFUSED = {
    "optimizer": "the optimizer is AdamW; set train.lr, train.betas, train.weight_decay",
    "scheduler": "set train.lr and train.warmup_images",
    "fp16": "set engine.precision=fp16",
    "bf16": "set engine.precision=bf16",
    "bfloat16": "set engine.precision=bf16",
    "torch_autocast": "set engine.precision",
    "amp": "set engine.precision",
    "data_types": "gradients are accumulated in float32 at every precision",
    "gradient_clipping": "set train.grad_clip",
    "activation_checkpointing": "set engine.activation_checkpointing",
    "checkpoint": "checkpoints are written by this project, not by DeepSpeed",
    "compile": "set engine.compile",
    "elasticity": "a run continues on any number of processes as it is",
    "zero_optimization.offload_param": "only the optimizer can be offloaded: engine.offload_optimizer",
    "zero_optimization.offload_optimizer": "set engine.offload_optimizer",
    "zero_optimization.zero_hpz_partition_size": "checkpoints need every element to have one owner",
    "zero_optimization.mics_shard_size": "checkpoints need every element to have one owner",
    "zero_optimization.zero_quantized_weights": "weights are float32",
    "zero_optimization.round_robin_gradients": "checkpoints need contiguous partitions",
    "zero_optimization.zenflow": "the optimizer is AdamW",
}
_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch (it follows from the batch, the processes and this)",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.reduce_bucket_size": "engine.bucket_elements",
    "zero_optimization.allgather_bucket_size": "engine.bucket_elements",
    "zero_optimization.compute_grad_norm": "nothing: our optimizer takes the norm",
    "zero_optimization.sub_group_size": "nothing: one group, so that the norm is that of all",
}


_STAGE3 = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 5_000_000}


def deepspeed_settings(
    config: RunConfig, device: torch.device, *, micro_batch: int, accumulation: int, num_params: int
) -> Settings:
    """The whole of what DeepSpeed is told. Raises ConfigError where `engine.deepspeed` contradicts the config."""
    engine = config.engine
    bucket = min(engine.bucket_elements, num_params)
    bucket += bucket % 2  # DeepSpeed wants a multiple of its alignment
    zero: Settings = {"stage": engine.zero_stage}
    if engine.zero_stage:
        zero |= {
            "overlap_comm": engine.overlap_comm and device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
    if engine.zero_stage == 3:
        zero["sub_group_size"] = 1 << 60
    elif engine.zero_stage and not engine.offload_optimizer:
        zero["compute_grad_norm"] = False  # ours needs no wait for the device
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    ours: Settings = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # ours does
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    settings = _merge(ours, engine.deepspeed)
    if engine.zero_stage == 3:
        # DeepSpeed's own values are for networks of billions: they keep ours gathered whole, and ZeRO-3 saves nothing.
        settings["zero_optimization"] = _STAGE3 | settings["zero_optimization"]
    return settings


def _merge(ours: Settings, theirs: Settings, path: str = "") -> Settings:
    merged = dict(ours)
    for key, value in theirs.items():
        where = f"{path}{key}"
        if where in _REFUSED:
            raise ConfigError(f"engine.deepspeed: {where}={value!r} cannot be used here; {_REFUSED[where]}.")
        if key in ours and isinstance(ours[key], dict) and isinstance(value, dict):
            merged[key] = _merge(ours[key], value, f"{where}.")
        elif key in ours and value not in ("auto", ours[key]):
            remedy = f"set {_OURS[where]} instead" if where in _OURS else "leave it out"
            raise ConfigError(f"engine.deepspeed: {where}={value!r} contradicts this run's {ours[key]!r}; {remedy}.")
        elif key not in ours:
            merged[key] = value
    return merged
