"""accelerate's configuration: how many processes, FSDP or DeepSpeed, precision.

Source: accelerate 1.15, commands/config/config_args.py (ClusterConfig), utils/launch.py.
"""

from typing import Final

from hfvram.read.fsdp_keys import fsdp
from hfvram.read.training_keys import Keys

MARKERS: Final = ("compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank")
NO_MATTER: Final = frozenset({
    "compute_environment", "debug", "machine_rank", "main_process_ip", "main_process_port", "main_training_function",
    "num_machines", "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "tpu_name",
    "tpu_zone", "enable_cpu_affinity", "gpu_ids", "mpirun_config", "command_file", "commands", "tpu_vm",
    "downcast_bf16", "ipex_config", "use_cpu",
})  # fmt: skip


def read(keys: Keys) -> None:
    """Read a configuration."""
    kind = (keys.text("distributed_type") or "NO").upper().replace("FALSE", "NO")
    gpus = keys.number("num_processes") if keys.values.get("num_processes") != -1 else None
    keys.put(gpus=gpus)
    word = keys.text("mixed_precision")
    word = "no" if word == "false" else word
    if word in ("no", "bf16", "fp16"):
        keys.put(mixed_precision=word)
    elif word:
        keys.unknown.append(keys.told("mixed_precision", word))
    sharded, zero = keys.section("fsdp_config"), keys.section("deepspeed_config")
    if sharded and sharded.values and zero and zero.values:
        keys.notes.append(f"{keys.file} contradicts itself: fsdp_config and deepspeed_config; {kind} is taken")
    if kind == "FSDP":
        fsdp(sharded or Keys(keys.file, {}, options=keys.options, notes=keys.notes))
    elif kind == "DEEPSPEED":
        _deepspeed(keys, zero)
    elif kind not in ("NO", "MULTI_GPU"):
        keys.unknown.append(keys.told("distributed_type", kind))
    if kind == "NO" and gpus and gpus > 1:
        keys.notes.append(f"{keys.file} contradicts itself: num_processes {gpus} with distributed_type NO")
    if split := keys.section("parallelism_config"):
        _parallel(split)
    keys.finish(NO_MATTER, ("fp8_config", "dynamo_config", "megatron_lm_config"))


def _deepspeed(keys: Keys, zero: Keys | None) -> None:
    if zero is None:
        return
    keys.deepspeed = zero.text("deepspeed_config_file")
    if keys.deepspeed is None:
        stage = zero.raw("zero_stage")
        keys.put(zero=int(str(stage)) if str(stage) in ("0", "1", "2", "3") else 2)
        for name, what in (("offload_optimizer_device", "optimizer"), ("offload_param_device", "params")):
            device = (zero.text(name) or "none").lower()
            if device in ("cpu", "nvme"):
                keys.offload(what if device == "cpu" else f"{what}=nvme")
    keys.put(grad_accum=zero.number("gradient_accumulation_steps"))
    zero.finish((
        *("deepspeed_multinode_launcher", "zero3_init_flag", "zero3_save_16bit_model", "gradient_clipping"),
        *("deepspeed_hostfile", "deepspeed_inclusion_filter", "deepspeed_exclusion_filter"),
        *("deepspeed_moe_layer_cls_names", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
    ))  # fmt: skip


def _parallel(split: Keys) -> None:
    sizes = {n: split.number(f"parallelism_config_{n}_size", f"{n}_size") for n in ("tp", "cp", "dp_replicate")}
    split.put(tp=sizes["tp"], cp=sizes["cp"] if (sizes["cp"] or 1) > 1 else None)
    if (sizes["dp_replicate"] or 1) > 1:
        split.put(fsdp="hybrid_shard")
    split.number("parallelism_config_dp_shard_size", "dp_shard_size")
    split.finish(("parallelism_config_cp_comm_strategy",))
