"""DeepSpeed's settings from ours, and those that a user adds in DeepSpeed's own words.

Only trainer/engine.py reads what is made here.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch

from data_pipeline.errors import ConfigError
from trainer.config.run import RunConfig

Settings = dict[str, Any]

# What the contracts rest on (float32 masters, our optimizer, our checkpoints), or what our own keys say: the remedy.
# A block of these that is switched off is harmless, and left out.
_REFUSED = {
    "optimizer": "the optimizer is AdamW; set train.lr, train.betas, train.weight_decay",
    "scheduler": "set train.lr, train.warmup_images and train.lr_decay",
    "fp16": "set engine.precision=fp16",
    "bf16": "set engine.precision=bf16",
    "bfloat16": "set engine.precision=bf16",
    "torch_autocast": "set engine.precision",
    "amp": "set engine.precision",
    "data_types": "gradients are accumulated in float32 at every precision",
    "gradient_clipping": "set train.grad_clip",
    "sparse_gradients": "gradients are dense",
    "activation_checkpointing": "set engine.activation_checkpointing",
    "checkpoint": "checkpoints are written by this project, not by DeepSpeed",
    "nebula": "checkpoints are written by this project, not by DeepSpeed",
    "datastates": "checkpoints are written by this project, not by DeepSpeed",
    "compile": "set engine.compile",
    "elasticity": "a run continues on any number of processes as it is",
    "autotuning": "set train.micro_batch, or start with --auto-micro-batch",
    "tensor_parallel": "every process has the whole network, or its part under ZeRO-3",
    "expert_parallel": "the network has no experts",
    "use_data_before_expert_parallelism": "the network has no experts",
    "sequence_parallel_size": "every process has images of its own",
    "seq_parallel_communication_data_type": "every process has images of its own",
    "pipeline": "every process computes the whole network",
    "hybrid_engine": "it is for language models",
    "data_efficiency": "the order of the images is this project's, so that a run can be repeated bit for bit",
    "curriculum_learning": "the order of the images is this project's, so that a run can be repeated bit for bit",
    "progressive_layer_drop": "the network has no layers to drop; set model.dropout",
    "compression_training": "weights are float32",
    "quantize_training": "weights are float32",
    "weight_quantization": "weights are float32",
    "eigenvalue": "it belongs to quantization, and weights are float32",
    "sparse_attention": "attention is dense",
    "zero_optimization.offload_param": "only the optimizer can be offloaded: engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "only the optimizer can be offloaded: engine.offload_optimizer",
    "zero_optimization.offload_optimizer": "set engine.offload_optimizer",
    "zero_optimization.cpu_offload": "set engine.offload_optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "set engine.offload_optimizer",
    "zero_optimization.zero_hpz_partition_size": "checkpoints need every element to have one owner",
    "zero_optimization.mics_shard_size": "checkpoints need every element to have one owner",
    "zero_optimization.zero_quantized_weights": "weights are float32",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights are float32",
    "zero_optimization.zero_quantized_gradients": "gradients are reduced as they are, not rounded to 4 bits",
    "zero_optimization.round_robin_gradients": "checkpoints need contiguous partitions",
    "zero_optimization.parameter_alignment": "checkpoints need contiguous partitions",
    "zero_optimization.elastic_checkpoint": "checkpoints are written by this project, not by DeepSpeed",
    "zero_optimization.legacy_stage1": "checkpoints need contiguous partitions",
    "zero_optimization.zenflow": "the optimizer is AdamW",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
}
# What is refused where it differs from what this run tells DeepSpeed: the remedy.
_OURS = {
    "train_batch_size": "set train.global_batch instead",
    "train_micro_batch_size_per_gpu": "set train.micro_batch instead",
    "gradient_accumulation_steps": "set train.micro_batch instead (it follows from the batch, the processes and this)",
    "managed_gradient_accumulation": "leave it out: the loop counts on it",
    "gradient_allreduce_op": "leave it out: a step's gradient is the mean over its batch",
    "zero_allow_untested_optimizer": "leave it out: the optimizer is this project's own AdamW",
    "zero_optimization.stage": "set engine.zero_stage instead",
    "zero_optimization.overlap_comm": "set engine.overlap_comm instead",
    "zero_optimization.reduce_bucket_size": "set engine.bucket_elements instead",
    "zero_optimization.allgather_bucket_size": "set engine.bucket_elements instead",
    "zero_optimization.compute_grad_norm": "leave it out: this project's optimizer takes the norm, on the device",
    "zero_optimization.sub_group_size": "leave it out: the norm that clips is that of one group of all weights",
}
# What else DeepSpeed 0.19 reads. Of a name that it does not know it says nothing.
_FREE = {
    "aio", "comet", "comms_logger", "communication_data_type", "csv_monitor", "dataloader_drop_last",
    "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level",
    "memory_breakdown", "prescale_gradients", "tensorboard", "timers", "vocabulary_size", "wall_clock_breakdown",
    "wandb", "zero_optimization",
}  # fmt: skip
_ZERO_NUMBERS = {
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
}  # fmt: skip
_ZERO_SWITCHES = {
    "allgather_partitions", "contiguous_gradients", "enable_sanity_checks", "ignore_unused_parameters",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear", "override_module_apply",
    "pipeline_loading_checkpoint", "reduce_scatter", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
}  # fmt: skip
_STAGE3 = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 5_000_000}


def deepspeed_settings(
    config: RunConfig, device: torch.device, *, micro_batch: int, accumulation: int, num_params: int
) -> Settings:
    """The whole of what DeepSpeed is told.

    `engine.deepspeed` may add to it; "auto" there means what would be told without it. Raises ConfigError for names
    that DeepSpeed does not know, and for settings that contradict the config or what the project rests on.
    """
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
        "managed_gradient_accumulation": True,
        "gradient_allreduce_op": "mean",
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
        if value == "auto":
            continue
        if where in _REFUSED:
            if not _is_off(value):
                raise ConfigError(f"engine.deepspeed: {where}={value!r} cannot be used here; {_REFUSED[where]}.")
        elif key in ours and isinstance(ours[key], dict) and isinstance(value, dict):
            merged[key] = _merge(ours[key], value, f"{where}.")
        elif key in ours:
            if value != ours[key]:
                remedy = _OURS.get(where, "leave it out")
                raise ConfigError(
                    f"engine.deepspeed: {where}={value!r} contradicts this run's {ours[key]!r}; {remedy}."
                )
        elif where not in _OURS:  # those mean nothing at this ZeRO stage
            merged[key] = _without_auto(_checked(where, value))
    return merged


def _is_off(value: Any) -> bool:
    """Whether a setting asks for nothing: false, null, an empty block, one not enabled, offloading to nowhere."""
    if not isinstance(value, dict):
        return value is False or value is None
    return not value or value.get("enabled") in (False, "auto") or value.get("device") == "none"


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}


def _checked(where: str, value: Any) -> Any:
    """A setting that is the user's own to make. Raises ConfigError for an unknown name, or what its value cannot be."""
    path, dot, key = where.rpartition(".")
    known = _ZERO_NUMBERS | _ZERO_SWITCHES | {"leaf_module"} if dot else _FREE
    if key not in known:
        refused = {name[len(path + dot) :] for name in {**_REFUSED, **_OURS} if name.rpartition(".")[0] == path}
        close = difflib.get_close_matches(key, sorted(known | refused), n=1)
        hint = f"did you mean {path}{dot}{close[0]}?" if close else "its documentation lists the names."
        raise ConfigError(f"engine.deepspeed: {where}={value!r} is not known to DeepSpeed; {hint}")
    if dot and key in _ZERO_NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1 != 0:
            raise ConfigError(f"engine.deepspeed: {where}={value!r} must be a whole number from 0, or auto.")
        return int(value)
    if dot and key in _ZERO_SWITCHES and not isinstance(value, bool):
        raise ConfigError(f"engine.deepspeed: {where}={value!r} must be true, false or auto.")
    return value
