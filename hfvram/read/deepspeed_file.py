"""DeepSpeed's JSON: ZeRO's stage, what is offloaded, batches, precision; "auto" is what the trainer says.

Source: DeepSpeed 0.19, runtime/zero/config.py, runtime/config.py; transformers 5.17, integrations/deepspeed.py.
"""

from typing import Any, Final

from hfvram.read.training_keys import Keys

MARKERS: Final = (
    "zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "zero_allow_untested_optimizer",
    "wall_clock_breakdown", "steps_per_print",
)  # fmt: skip
OPTIMIZERS: Final = {"adam": "adamw_torch_fused", "adamw": "adamw_torch_fused", "sgd": "sgd", "muon": "muon"}
NO_MATTER: Final = frozenset({
    "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "scheduler", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "prescale_gradients", "communication_data_type", "dump_state", "tensorboard",
    "wandb", "csv_monitor", "comms_logger", "flops_profiler", "memory_breakdown", "checkpoint", "data_types",
    "elasticity", "autotuning", "gradient_predivide_factor", "sparse_gradients", "disable_allgather", "aio",
})  # fmt: skip
ZERO_NO_MATTER: Final = frozenset({
    "overlap_comm", "allgather_partitions", "reduce_scatter", "contiguous_gradients", "round_robin_gradients",
    "gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters",
    "elastic_checkpoint", "load_from_fp32_weights", "legacy_stage1", "sub_group_size",
})  # fmt: skip
BUCKETS: Final = (
    "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "prefetch_bucket_size",
    "stage3_param_persistence_threshold", "param_persistence_threshold", "stage3_max_live_parameters",
    "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance",
)  # fmt: skip
ZERO_UNCOUNTED: Final = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients", "mics_shard_size", "zenflow",
)  # fmt: skip


def nested(keys: Keys) -> Any:
    """What a trainer's file has for `deepspeed`: a mapping is read, of which the trainer's own options win; a path is
    kept to be read later. Raises `usage` for anything else.
    """
    value = keys.raw("deepspeed")
    if isinstance(value, dict):
        inner, outer = keys.section("deepspeed"), dict(keys.options)
        assert inner is not None
        read(inner)
        keys.options |= {k: v for k, v in outer.items() if k != "offload"}
        keys.total_batch = inner.total_batch
    elif isinstance(value, str):
        keys.deepspeed = value
    elif value is not None and value is not False:
        raise keys.wrong("deepspeed", value, "a path or a mapping")
    return value


def read(keys: Keys) -> None:
    """Read a configuration."""
    keys.put(batch=keys.number("train_micro_batch_size_per_gpu"), grad_accum=keys.number("gradient_accumulation_steps"))
    keys.total_batch = keys.number("train_batch_size")
    if zero := keys.section("zero_optimization"):
        _zero(zero)
    _precision(keys)
    if made := keys.section("optimizer"):
        name = made.text("type")
        known = OPTIMIZERS.get((name or "").lower())
        if name and not known:
            made.unknown.append(made.told("type", name))
        keys.put(optimizer=known)
        made.finish(("params", "legacy_fusion"))
    if kept := keys.section("activation_checkpointing"):
        if kept.flag("cpu_checkpointing"):
            kept.offload("activations")
        kept.finish(
            ("contiguous_memory_optimization", "number_checkpoints", "synchronize_checkpoint_boundary", "profile"),
            ("partition_activations",),
        )
    if split := keys.section("tensor_parallel"):
        keys.put(tp=split.number("autotp_size"))
        split.finish(("tp_grain_size", "tp"))
    keys.finish(NO_MATTER, ("compression_training", "sparse_attention", "quantize_training", "compile"))


def _zero(zero: Keys) -> None:
    stage = zero.raw("stage")
    stage = int(stage) if isinstance(stage, str) and stage in ("0", "1", "2", "3") else stage
    if stage is not None and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise zero.wrong("stage", stage, "one of 0, 1, 2, 3")
    zero.options["zero"] = 0 if stage is None else stage
    for name, what in (("offload_optimizer", "optimizer"), ("offload_param", "params")):
        if part := zero.section(name):
            _offload(part, what)
    if zero.flag("cpu_offload"):
        zero.offload("optimizer")
    _buckets(zero)
    zero.finish(ZERO_NO_MATTER, ZERO_UNCOUNTED)


def _buckets(zero: Keys) -> None:
    """The reduce bucket, and with `auto` what follows from the hidden size; other numbers are told, not counted."""
    size = zero.values.get("reduce_bucket_size")
    zero.taken.add("reduce_bucket_size")
    if size is not None and zero.options["zero"]:
        number = str(size).strip()
        if number != "auto" and not number.replace(".", "").replace("e", "").replace("+", "").isdigit():
            raise zero.wrong("reduce_bucket_size", size, "a number of elements, or auto")
        zero.put(zero_bucket=number)
    others = [name for name in BUCKETS[1:] if zero.values.get(name) not in (None, "auto")]
    zero.taken |= set(BUCKETS)
    if others:
        zero.notes.append(f"{zero.file}: counted as DeepSpeed's defaults or auto, not as here: {', '.join(others)}")


def _offload(part: Keys, what: str) -> None:
    device = (part.text("device") or "none").lower()
    if device in ("cpu", "nvme"):
        part.offload(what if device == "cpu" else f"{what}=nvme")
    elif device != "none":
        part.unknown.append(part.told("device", device))
    part.finish(
        ("pin_memory", "nvme_path", "fast_init", "buffer_size", "pipeline_read", "pipeline_write", "max_in_cpu"),
        ("buffer_count", "ratio"),
    )


def _precision(keys: Keys) -> None:
    """fp16 and bf16 each have `enabled`; both is what DeepSpeed refuses."""
    on = []
    for name in ("bf16", "bfloat16", "fp16"):
        if part := keys.section(name):
            if part.flag("enabled"):
                on.append("fp16" if name == "fp16" else "bf16")
            part.finish(
                (
                    *("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale"),
                    *("auto_cast", "consecutive_hysteresis", "immediate_grad_update", "check_grad_overflow"),
                ),
                ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
            )
    if len(set(on)) > 1:
        keys.notes.append(f"{keys.file} contradicts itself: bf16 and fp16 are both enabled; bf16 is taken")
    if on:
        keys.put(mixed_precision="bf16" if "bf16" in on else "fp16")
