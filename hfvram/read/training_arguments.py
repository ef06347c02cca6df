"""transformers' TrainingArguments in YAML or JSON, alone or with TRL's own keys: as their parsers take them.

Source: transformers 5.17, training_args.py; TRL 1.10, trainer/base_config.py, model_config.py, sft_trainer.py.
"""

from typing import Any, Final

from hfvram.read import deepspeed_file
from hfvram.read.fsdp_keys import fsdp
from hfvram.read.training_keys import Keys, names, optimizer, precision

MARKERS: Final = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate", "output_dir",
    "model_name_or_path", "optim", "gradient_checkpointing", "lr_scheduler_type", "max_steps",
    "use_peft", "fsdp", "bf16", "fp16", "max_length",
)  # fmt: skip
TRL: Final = frozenset({
    "use_peft", "lora_r", "lora_target_modules", "lora_modules_to_save", "load_in_4bit", "load_in_8bit", "max_length",
    "max_seq_length", "packing", "padding_free", "dataset_text_field", "assistant_only_loss", "completion_only_loss",
    "num_generations", "max_prompt_length", "max_completion_length", "beta", "reward_funcs", "dataset_name",
    "dataset_mixer", "dataset_mixture", "eos_token", "chat_template_path", "loss_type", "activation_offloading",
})  # fmt: skip
"""Keys that make it a file of TRL, whose own defaults then hold."""
GRPO: Final = ("num_generations", "max_completion_length", "reward_funcs", "use_vllm")
DPO: Final = ("beta", "precompute_ref_log_probs", "reference_free", "label_pad_token_id", "rpo_alpha", "sync_ref_model")
NO_MATTER: Final = names(
    """
    output_dir overwrite_output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices
    label_smoothing_factor bf16_full_eval fp16_full_eval tf32 gradient_checkpointing_kwargs use_cache logging_dir
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    include_num_input_tokens_seen log_level_replica disable_tqdm report_to run_name project trackio_space_id
    eval_strategy evaluation_strategy eval_steps eval_delay eval_on_start include_for_metrics save_only_model
    save_strategy save_steps save_on_each_node save_total_limit save_safetensors push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip full_determinism seed data_seed accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor remove_unused_columns label_names group_by_length train_sampling_strategy
    length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout
    debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    per_device_eval_batch_size max_grad_norm auto_find_batch_size trust_remote_code lora_alpha lora_task_type
    dataset_name dataset_config dataset_train_split dataset_test_split dataset_num_proc dataset_text_field
    dataset_kwargs dataset_mixer dataset_mixture dataset_streaming dataset_split eos_token pad_token chat_template
    chat_template_path completion_only_loss assistant_only_loss truncation_mode shuffle_dataset packing_strategy
    eval_packing preprocessing_num_workers tokenizer_name_or_path tokenizer_name config_name cache_dir train_file
    validation_file train_batch_size eval_batch_size bnb_4bit_compute_dtype wandb_project wandb_entity
    system_prompt loss_type beta label_pad_token_id rpo_alpha temperature top_p top_k reward_funcs reward_weights
    scale_rewards max_train_samples max_eval_samples script_args config hub_model_revision env log_completions
    """
)
"""Keys that take no GPU memory while training, or hold what is not asked here (evaluation)."""
UNCOUNTED: Final = (
    "use_liger_kernel", "torch_compile", "torch_compile_backend", "torch_compile_mode", "neftune_noise_alpha",
    "optim_args", "optim_target_modules", "torch_empty_cache_steps", "activation_offloading", "lora_target_parameters",
    "use_vllm", "sync_ref_model", "precompute_ref_log_probs", "parallelism_config", "pad_to_multiple_of",
    "bnb_4bit_quant_storage",
)  # fmt: skip


def read(keys: Keys) -> None:
    """Read a file of TrainingArguments, with TRL's keys and defaults where it has one of them."""
    trl = bool(TRL & {k for k, v in keys.values.items() if v is not None})
    trainer(keys, trl)
    keys.model = keys.text("model_name_or_path", "model_id", "model_name")
    revision = keys.text("model_revision")
    keys.revision = None if revision == "main" else revision
    _length(keys, trl)
    inside = keys.section("model_init_kwargs")
    if inside:
        keys.put(dtype=inside.dtype("dtype", "torch_dtype"), attention=inside.attention("attn_implementation"))
        inside.finish(("trust_remote_code", "revision", "use_cache", "device_map"))
    keys.put(dtype=keys.dtype("dtype", "torch_dtype"), attention=keys.attention("attn_implementation"))
    if trl:
        keys.implied.setdefault("dtype", "fp32")
    adapter(keys)
    if keys.flag("packing", "padding_free"):
        keys.notes.append(f"{keys.file}: packed sequences count as batch × ctx of one length")
    keys.finish(NO_MATTER, UNCOUNTED)


def trainer(keys: Keys, trl: bool) -> None:
    """What TrainingArguments says of batches, precision, optimizer and sharding."""
    keys.put(
        mode="train",
        batch=keys.number("per_device_train_batch_size", "per_gpu_train_batch_size"),
        grad_accum=keys.number("gradient_accumulation_steps"),
        optimizer=optimizer(keys.text("optim")),
        gradient_checkpointing=keys.flag("gradient_checkpointing"),
        mixed_precision=precision(keys, keys.flag("bf16"), keys.flag("fp16")),
    )
    keys.implied |= {"batch": 8, "optimizer": "adamw_torch_fused"}
    if trl:
        keys.implied |= {"gradient_checkpointing": True, "mixed_precision": "bf16"}
    if inside := keys.section("gradient_checkpointing_kwargs"):
        every = inside.number("every_n_layers")
        keys.put(checkpoint_every=every if keys.options.get("gradient_checkpointing") else None)
        if inside.flag("offload") and keys.options.get("gradient_checkpointing"):
            keys.offload("activations")
        inside.finish(("use_reentrant", "preserve_rng_state", "determinism_check", "debug"))
    deepspeed_file.nested(keys)
    _sharding(keys)


def _sharding(keys: Keys) -> None:
    asked: Any = keys.raw("fsdp")
    words = tuple(asked.replace(",", " ").split()) if isinstance(asked, str) else ()
    words = tuple(str(w) for w in asked) if isinstance(asked, list) else words
    on = asked is True or (bool(words) and words[0].lower() not in ("false", "no"))
    if on and (keys.deepspeed or "zero" in keys.options):
        keys.notes.append(f"{keys.file} contradicts itself: deepspeed and fsdp; deepspeed is taken")
        on = False
    section = keys.section("fsdp_config") if not isinstance(keys.values.get("fsdp_config"), str) else None
    if isinstance(keys.values.get("fsdp_config"), str):
        keys.taken.add("fsdp_config")
        keys.uncounted.append("fsdp_config")
    if on:
        fsdp(section or Keys(keys.file, {}, options=keys.options, notes=keys.notes, unknown=keys.unknown), words=words)


def _length(keys: Keys, trl: bool) -> None:
    """Tokens of a sequence; a pair of preferences is two of them, a sampled group prompt and completion."""
    said = keys.number("max_length", "max_seq_length", "block_size", "max_seq_len", "model_max_length")
    prompt, completion = keys.number("max_prompt_length"), keys.number("max_completion_length")
    has = {k for k, v in keys.values.items() if v is not None}
    keys.number("num_generations")
    if has & set(GRPO):
        said = (prompt or 512) + (completion or 256)
        keys.notes.append(f"{keys.file}: GRPO counts as a step on prompt and completion, its sampling does not")
    elif has & set(DPO):
        keys.put(batch=2 * int(keys.options.get("batch", keys.implied.get("batch", 8))))
        keys.notes.append(f"{keys.file}: DPO counts two sequences a pair, without the reference model beside them")
    keys.put(ctx=said)
    if trl and "max_length" not in keys.values:
        keys.implied["ctx"] = 1024
    elif said is None:
        keys.notes.append(f"{keys.file} has no length of sequences: --ctx says it")


def adapter(keys: Keys) -> None:
    """TRL's keys for PEFT and bitsandbytes."""
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    peft = keys.flag("use_peft")
    ranks = {
        "lora_r": keys.number("lora_r"),
        "lora_targets": targets(keys, "lora_target_modules"),
        "lora_dropout": keys.share("lora_dropout"),
        "modules_to_save": keys.words("lora_modules_to_save"),
        "rslora": keys.flag("use_rslora") or None,
        "dora": keys.flag("use_dora") or None,
    }
    kind, nested = keys.text("bnb_4bit_quant_type"), keys.flag("use_bnb_nested_quant", "bnb_4bit_use_double_quant")
    if not (peft or four or eight):
        if any(v is not None for v in ranks.values()):
            keys.notes.append(f"{keys.file} has LoRA's settings, but use_peft is not true: all parameters are trained")
        return
    if not peft:
        keys.notes.append(f"{keys.file} contradicts itself: quantized weights without use_peft; LoRA is taken")
    keys.put(mode="lora", **ranks)
    keys.implied |= {"lora_r": 16, "lora_dropout": 0.05, "lora_targets": "default"}
    quantized(keys, four, eight, kind, nested)
    if four or eight:
        keys.implied["adapter_dtype"] = "bf16"


def targets(keys: Keys, *names: str) -> tuple[str, ...] | str | None:
    """Modules that get adapters: names, a pattern, or all linear ones."""
    said = keys.raw(*names)
    if isinstance(said, str) and "," not in said and not said.isidentifier() and said != "all-linear":
        return said
    found = keys.words(*names)
    return "all-linear" if found and found[0] in ("all-linear", "all") else found


def quantized(keys: Keys, four: bool | None, eight: bool | None, kind: str | None, double: bool | None) -> None:
    """The frozen weights in 4 or 8 bits; without a word on it, their scales are not quantized in turn."""
    if four and eight:
        keys.notes.append(f"{keys.file} contradicts itself: load_in_4bit and load_in_8bit; 4 bits are taken")
    if four:
        keys.put(mode="qlora", quant=kind or "nf4", double_quant=bool(double))
    elif eight:
        keys.put(mode="qlora", quant="int8")
