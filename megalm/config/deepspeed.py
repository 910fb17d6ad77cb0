"""DeepSpeed's own configuration of a run: what follows from the run's config, and with it what the user adds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalm.config.sections import Config
from megalm.config.text import Raw, merged
from megalm.errors import nearest

OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "scheduler", "fp16", "amp", "torch_autocast",
    "tensor_parallel", "checkpoint",
)  # fmt: skip
"""What would say again what the run's config says."""
THEIRS = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "comms_logger", "communication_data_type", "compile",
    "compression_training", "csv_monitor", "data_efficiency", "data_types", "dump_state", "dataloader_drop_last",
    "disable_allgather", "elasticity", "flops_profiler", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "memory_breakdown", "monitor_config", "nebula", "prescale_gradients",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "steps_per_print", "tensorboard",
    "timers", "use_node_local_storage", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""Settings of DeepSpeed, for mistakes in their names; a name unlike all of these may be of a newer version."""


def engine_settings(config: Config) -> Raw:
    """What `deepspeed.initialize` is given: the section `deepspeed`, and over it what the rest of the config says.

    Accumulation, clipping and the learning rate are the trainer's. The engine sees each micro-batch as one step of
    which the trainer says whether it is the last one, so it has no more than one micro-batch to accumulate.
    """
    micro, zero = config.batch.micro_size or 1, config.parallel.zero
    sharding: Raw = {"stage": zero.stage}
    if zero.offload != "none":
        sharding["offload_optimizer"] = {"device": zero.offload}
        if zero.stage == 3:
            sharding["offload_param"] = {"device": zero.offload}
    ours: Raw = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.precision.compute == "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }
    return merged(config.deepspeed, ours)


def broken_rules(config: Config, data: int) -> Iterator[str]:
    """One line for each rule that the engine `deepspeed` sets and the config, for `data` data ranks, breaks."""
    zero, parallel, theirs = config.parallel.zero, config.parallel, config.deepspeed
    if zero.engine != "deepspeed":
        if theirs:
            yield "deepspeed has no meaning with parallel.zero.engine='fsdp': remove it, or choose engine deepspeed"
        return
    if parallel.pipeline.size > 1:
        yield (
            f"parallel.pipeline.size={parallel.pipeline.size} cannot be run by parallel.zero.engine='deepspeed', whose "
            "stages 2 and 3 go wrong with several micro-batches in flight: choose engine fsdp, or size 1"
        )
    if zero.stage == 0:
        yield (
            "parallel.zero.stage=0 cannot be run by parallel.zero.engine='deepspeed', which then begins with an update "
            "by no gradients: choose stage 1, 2 or 3, or engine fsdp"
        )
    if (zero.shard or data) != data:
        yield (
            f"parallel.zero.shard={zero.shard} of {data} data ranks cannot be run by parallel.zero.engine='deepspeed': "
            f"choose {data}, or engine fsdp"
        )
    if config.optimizer.kind != "adamw":
        yield (
            f"optimizer.kind='{config.optimizer.kind}' cannot be run by parallel.zero.engine='deepspeed': choose "
            "adamw, or engine fsdp"
        )
    if config.run.compile:
        yield "run.compile=true has not been tried with DeepSpeed's hooks: set it to false, or choose engine fsdp"
    if config.run.recompute == "selective" and zero.stage == 3:
        yield (
            "run.recompute=selective cannot be run by DeepSpeed's stage 3, which gathers otherwise when it computes "
            "again: choose full or none, or engine fsdp"
        )
    for name in theirs:
        if name in OURS:
            yield f"deepspeed.{name} is for the run's own config to say: remove it"
        elif name not in THEIRS and (hint := nearest(name, THEIRS)):
            yield f"deepspeed.{name} is no setting of DeepSpeed, which would pass over it.{hint}"
    sharding = theirs.get("zero_optimization")
    for section in ("offload_optimizer", "offload_param"):
        if zero.offload == "none" and isinstance(sharding, dict) and section in sharding:
            yield f"deepspeed.zero_optimization.{section} has no meaning with parallel.zero.offload='none': choose cpu"
    for key, value, right in _contradictions(theirs, engine_settings(config)):
        yield f"deepspeed.{key}={value} contradicts the rest of the config, which means {right}: leave it out"


def _contradictions(given: Raw, settings: Raw, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, value and right value of what is `given` and is not so in the `settings` that were made of it."""
    for key, value in given.items():
        right = settings[key]
        if isinstance(value, dict) and isinstance(right, dict):
            yield from _contradictions(value, right, f"{path}{key}.")
        elif value != right:
            yield path + key, value, right
