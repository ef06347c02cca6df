"""Axolotl's YAML.

Source: Axolotl at 067b021c, utils/schemas/{config,model,peft,training,fsdp}.py, utils/config/__init__.py
(resolve_dtype), loaders/model.py, core/builders/base.py.
"""

from typing import Any, Final

from hfvram.read import deepspeed_file
from hfvram.read.fsdp_keys import fsdp
from hfvram.read.training_arguments import quantized
from hfvram.read.training_keys import Keys, names, optimizer

MARKERS: Final = ("base_model", "micro_batch_size", "sequence_len", "sample_packing", "lora_target_linear")
FLAGS: Final = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
NO_MATTER: Final = names(
    """
    datasets test_datasets dataset_prepared_path val_set_size output_dir model_type tokenizer_type
    tokenizer_config tokenizer_use_fast tokenizer_legacy processor_type trust_remote_code hub_model_id
    hub_strategy push_dataset_to_hub hf_use_auth_token strict lora_alpha lora_model_dir lora_fan_in_fan_out
    wandb_project wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id wandb_mode mlflow_tracking_uri
    mlflow_experiment_name num_epochs lr_scheduler lr_scheduler_kwargs learning_rate tf32 train_on_inputs
    group_by_length logging_steps resume_from_checkpoint auto_resume_from_checkpoints warmup_steps warmup_ratio
    evals_per_epoch eval_steps eval_table_size eval_max_new_tokens eval_sample_packing eval_batch_size
    eval_strategy saves_per_epoch save_steps save_strategy save_total_limit save_safetensors save_first_step
    save_only_model weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm special_tokens tokens
    chat_template chat_template_jinja roles_to_train train_on_eos debug seed max_steps early_stopping_patience
    loss_watchdog_threshold loss_watchdog_patience local_rank ddp ddp_timeout dataset_processes dataset_num_proc
    shuffle_merged_datasets dataset_keep_in_memory dataset_exact_deduplication gradient_checkpointing_kwargs
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor pad_to_sequence_len
    sample_packing_group_size sample_packing_bin_size sample_packing_sequentially pretraining_dataset streaming
    skip_prepare_dataset default_system_message is_llama_derived_model is_mistral_derived_model
    is_falcon_derived_model is_qwen_derived_model fsdp_final_state_dict_type use_tensorboard gc_steps
    low_cpu_mem_usage include_tokens_per_second rl_beta excess_length_strategy remove_unused_columns
    load_best_model_at_end metric_for_best_model do_bench_eval cosine_min_lr_ratio base_model_config
    base_model_ignore_patterns ray_num_workers use_ray ddp_find_unused_parameters heads_k_stride eot_tokens
    """
)
UNCOUNTED: Final = (
    *("plugins", "torch_compile", "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "lora_mlp_kernel"),
    *("lora_qkv_kernel", "lora_o_kernel", "unsloth_lora_mlp", "unsloth_cross_entropy_loss", "chunked_cross_entropy"),
    *("tiled_mlp", "relora", "peft_layers_to_transform", "peft_trainable_token_indices", "lora_target_parameters"),
    *("peft_layer_replication", "lora_on_cpu", "gptq", "loftq_config", "neftune_noise_alpha", "layer_offloading"),
    *("selective_checkpointing", "unfrozen_parameters", "embeddings_skip_upcast", "optim_args", "optim_target_modules"),
    *("fp8", "qat", "quantize_moe_experts", "max_memory", "gpu_memory_limit", "torch_empty_cache_steps", "peft"),
    *("resize_token_embeddings_to_32x", "batch_flattening", "auto_find_batch_size", "model_quantization_config"),
    *("liger_cross_entropy", "liger_fused_linear_cross_entropy", "cut_cross_entropy", "liger_rope", "liger_rms_norm"),
    *(
        "liger_glu_activation",
        "liger_layer_norm",
        "use_kernels",
        "trl",
        "vllm",
        "expert_parallel_size",
        "lisa_n_layers",
    ),
)


def read(keys: Keys) -> None:
    """Read a file."""
    keys.model = keys.text("base_model")
    keys.revision = keys.text("revision_of_model")
    micro, accum, whole = (keys.number(n) for n in ("micro_batch_size", "gradient_accumulation_steps", "batch_size"))
    keys.put(
        mode="train",
        ctx=keys.number("sequence_len"),
        batch=micro,
        grad_accum=accum or (max(1, whole // (micro or 1)) if whole else None),
        optimizer=optimizer(keys.text("optimizer")),
    )
    keys.implied |= {"batch": 1, "ctx": 512, "optimizer": "adamw_torch_fused"}
    _precision(keys)
    _checkpointing(keys)
    attention = keys.attention("attn_implementation")
    keys.put(attention=attention or next((v for k, v in FLAGS.items() if keys.flag(k)), None))
    keys.taken |= set(FLAGS)
    _adapter(keys)
    _sharding(keys)
    if keys.flag("sample_packing"):
        keys.notes.append(f"{keys.file}: packed sequences count as batch × ctx of one length")
    preferences = keys.text("rl")
    if preferences in ("dpo", "ipo", "orpo", "simpo", "kto"):
        keys.put(batch=2 * (micro or 1))
        keys.notes.append(f"{keys.file}: rl {preferences} counts two sequences a pair, without a reference model")
    elif preferences:
        keys.unknown.append(keys.told("rl", preferences))
    keys.finish(NO_MATTER, UNCOUNTED)


def _precision(keys: Keys) -> None:
    """`bf16` is autocast over weights loaded in bf16, as `auto` is on a GPU that has it; `bfloat16` and `full` are no
    autocast."""
    bf16: Any = keys.values.get("bf16")
    keys.taken.add("bf16")
    auto = bf16 == "auto" or str(bf16).lower() == "true"
    fp16 = keys.flag("fp16") and not auto
    if auto and keys.values.get("fp16") is True:
        keys.notes.append(f"{keys.file} contradicts itself: bf16 and fp16; bf16 is taken")
    pure = bf16 == "full" or keys.flag("bfloat16")
    half = keys.flag("float16")
    keys.flag("float32")
    dtype = "bf16" if auto or pure else "fp16" if fp16 or half else "fp32"
    keys.put(dtype=dtype, mixed_precision="bf16" if auto else "fp16" if fp16 else "no")


def _checkpointing(keys: Keys) -> None:
    word = keys.values.get("gradient_checkpointing")
    offloaded = word in ("offload", "unsloth")
    if word == "offload_disk":
        keys.unknown.append(keys.told("gradient_checkpointing", word))
    keys.taken.add("gradient_checkpointing")
    on = offloaded or word == "offload_disk" or keys.flag("gradient_checkpointing")
    keys.put(gradient_checkpointing=on)
    moved = keys.raw("activation_offloading")
    if offloaded or (moved in (True, "legacy", "hidden_states") and on):
        keys.offload("activations")
    elif moved:
        keys.uncounted.append("activation_offloading")


def _adapter(keys: Keys) -> None:
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    kind = keys.text("adapter")
    ranks = {
        "lora_r": keys.number("lora_r"),
        "lora_targets": "all-linear" if keys.flag("lora_target_linear") else keys.words("lora_target_modules"),
        "lora_dropout": keys.share("lora_dropout"),
        "modules_to_save": keys.words("lora_modules_to_save"),
        "rslora": keys.flag("peft_use_rslora") or None,
        "dora": keys.flag("peft_use_dora") or None,
    }
    keys.taken.add("lora_target_modules")
    inside = keys.section("bnb_config_kwargs")
    form = inside.text("bnb_4bit_quant_type") if inside else None
    double = inside.flag("bnb_4bit_use_double_quant") if inside else None
    if inside:
        inside.finish(("llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"))
    if kind not in ("lora", "qlora"):
        if kind:
            keys.unknown.append(keys.told("adapter", kind))
        if four or eight:
            keys.notes.append(f"{keys.file} contradicts itself: quantized weights without an adapter are not trained")
        return
    if kind == "qlora" and not four:
        keys.notes.append(f"{keys.file} contradicts itself: adapter qlora wants load_in_4bit; 4 bits are taken")
    if kind == "lora" and four:
        keys.notes.append(f"{keys.file}: adapter lora with load_in_4bit is QLoRA")
    keys.put(mode="lora", **ranks)
    if four or eight:
        keys.notes.append(
            f"{keys.file}: embeddings, head and norms count in fp32, as PEFT prepares; Axolotl casts them back"
        )
    keys.implied["adapter_dtype"] = "bf16" if keys.flag("peft_autocast_adapter_dtype") is False else "fp32"
    quantized(keys, four or kind == "qlora", eight and not four, form, True if double is None else double)


def _sharding(keys: Keys) -> None:
    sizes = {n: keys.number(n) for n in ("tensor_parallel_size", "context_parallel_size", "dp_shard_size")}
    replicas, world = keys.number("dp_replicate_size"), keys.number("world_size")
    context = sizes["context_parallel_size"] or keys.number("sequence_parallel_degree")
    keys.taken |= {"sequence_parallel_degree"}
    keys.put(tp=sizes["tensor_parallel_size"], cp=context if (context or 1) > 1 else None)
    given = [sizes["tensor_parallel_size"], context, sizes["dp_shard_size"], replicas]
    if any(given):
        total = 1
        for part in given:
            total *= part or 1
        keys.put(gpus=total)
    keys.put(gpus=world)
    words = keys.words("fsdp") or ()
    version = keys.number("fsdp_version")
    section = keys.section("fsdp_config")
    sharded = bool(words or section)
    if keys.raw("deepspeed") and sharded:
        keys.notes.append(f"{keys.file} contradicts itself: deepspeed and fsdp; deepspeed is taken")
    nested = deepspeed_file.nested(keys)
    if (nested is None or nested is False) and sharded:
        fsdp(section or Keys(keys.file, {}, options=keys.options, notes=keys.notes), version, words)
        if (replicas or 1) > 1:
            keys.put(fsdp="hybrid_shard")
    if keys.options["mode"] == "train" and not sharded and not nested and keys.options["dtype"] != "fp32":
        keys.notes.append(
            f"{keys.file}: Axolotl keeps embeddings and norms in fp32; {keys.options['dtype']} is counted"
        )
