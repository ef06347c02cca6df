"""FSDP's settings, which accelerate, TrainingArguments and Axolotl write alike but for a prefix.

Source: accelerate 1.15, utils/dataclasses.py (FullyShardedDataParallelPlugin); transformers 5.17, training_args.py
(_process_fsdp_args).
"""

from typing import Final

from hfvram.read.training_keys import Keys

STRATEGIES: Final = {
    **dict.fromkeys(("full_shard", "1", "true"), "full_shard"),
    **dict.fromkeys(("shard_grad_op", "2", "false"), "shard_grad_op"),
    **dict.fromkeys(("hybrid_shard", "4"), "hybrid_shard"),
}
"""Words, FSDP 1's numbers, and FSDP 2's reshard_after_forward; no_shard (3) is plain data parallel."""
NO_MATTER: Final = frozenset({
    "auto_wrap_policy", "transformer_layer_cls_to_wrap", "state_dict_type", "final_state_dict_type",
    "cpu_ram_efficient_loading", "sync_module_states", "use_orig_params", "backward_prefetch",
    "backward_prefetch_policy", "forward_prefetch", "limit_all_gathers", "cpu_offload_pin_memory", "xla", "xla_fsdp_v2",
})  # fmt: skip


def fsdp(keys: Keys, version: int | None = None, words: tuple[str, ...] = ()) -> None:
    """Read a section of FSDP's settings; `words` are those of an older list, `[full_shard, auto_wrap, offload]`."""
    plain = {name.removeprefix("fsdp_"): value for name, value in keys.values.items()}
    inner = Keys(
        file=keys.file,
        values=plain,
        prefix=keys.prefix,
        options=keys.options,
        uncounted=keys.uncounted,
        unknown=keys.unknown,
        notes=keys.notes,
    )
    keys.taken |= set(keys.values)
    version = inner.number("version", "fsdp_version") or version
    reshard = inner.text("reshard_after_forward")
    strategy = inner.text("sharding_strategy")
    named = next((w for w in words if w.lower() in (*STRATEGIES, "no_shard", "hybrid_shard_zero2")), None)
    said = strategy or named or reshard
    if strategy and reshard and STRATEGIES.get(reshard.lower()) != STRATEGIES.get(strategy.lower()):
        keys.notes.append(
            f"{keys.file} contradicts itself: sharding_strategy {strategy}, reshard_after_forward {reshard}"
        )
    chosen = STRATEGIES.get((said or "full_shard").lower())
    if chosen is None and said is not None and said.lower() not in ("no_shard", "3"):
        keys.unknown.append(keys.told("sharding_strategy", said))
        chosen = "hybrid_shard" if said.lower().startswith(("hybrid", "_hybrid", "5")) else "full_shard"
    keys.put(fsdp=chosen)
    if chosen and (version or 2) == 1:
        keys.notes.append(f"{keys.file}: FSDP 1 is counted as FSDP 2")
    if inner.flag("offload_params", "cpu_offload") or "offload" in words:
        keys.offload("params")
    if inner.flag("activation_checkpointing"):
        keys.put(gradient_checkpointing=True)
    inner.flag("mixed_precision")
    inner.finish(NO_MATTER, ("min_num_params", "mixed_precision_policy"))
