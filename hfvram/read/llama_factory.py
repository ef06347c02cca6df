"""LLaMA-Factory's YAML: TrainingArguments with keys and defaults of its own.

Source: LLaMA-Factory at ff6d4d12, hparams/{model,data,finetuning}_args.py, hparams/parser.py, model/adapter.py,
model/patcher.py.
"""

from typing import Final

from hfvram.read.training_arguments import NO_MATTER as TRAINERS
from hfvram.read.training_arguments import UNCOUNTED as TRAINER_UNCOUNTED
from hfvram.read.training_arguments import quantized, targets, trainer
from hfvram.read.training_keys import Keys, names

MARKERS: Final = ("stage", "finetuning_type", "cutoff_len", "template", "lora_rank", "lora_target", "quantization_bit")
ATTENTION: Final = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
NO_MATTER: Final = TRAINERS | names(
    """
    template dataset eval_dataset dataset_dir media_dir train_on_prompt mask_history streaming buffer_size
    mix_strategy interleave_probs overwrite_cache preprocessing_batch_size max_samples eval_num_beams
    ignore_pad_token_for_loss val_size eval_on_each_dataset tool_format default_system enable_thinking
    tokenized_path plot_loss compute_accuracy disable_shuffling early_stopping_steps use_fast_tokenizer
    split_special_tokens low_cpu_mem_usage infer_backend infer_dtype offload_folder use_kv_cache
    print_param_status hf_hub_token ms_hub_token om_hub_token lora_alpha loraplus_lr_ratio loraplus_lr_embedding
    pref_beta pref_ftx pref_loss dpo_label_smoothing use_swanlab swanlab_project swanlab_run_name swanlab_mode
    swanlab_api_key predict_with_generate ray_run_name ray_storage_path ray_num_workers resources_per_worker
    placement_strategy create_new_adapter use_reentrant_gc include_effective_tokens_per_second image_max_pixels
    video_max_pixels
    """
)
UNCOUNTED: Final = (
    *TRAINER_UNCOUNTED,
    *("enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "shift_attn", "mixture_of_depths", "upcast_layernorm"),
    *("upcast_lmhead_output", "use_llama_pro", "use_adam_mini", "use_badam", "use_mca", "use_hyper_parallel", "use_kt"),
    *("pissa_init", "adapter_name_or_path", "ref_model", "reward_model", "galore_rank", "apollo_rank", "resize_vocab"),
    *("use_muon", "use_asft_loss", "galore_layerwise", "apollo_layerwise", "neat_packing", "quantization_device_map"),
    *("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_trainable_layers", "freeze_trainable_modules"),
)


def read(keys: Keys) -> None:
    """Read a file."""
    trainer(keys, trl=False)
    keys.model = keys.text("model_name_or_path")
    revision = keys.text("model_revision")
    keys.revision = None if revision == "main" else revision
    keys.put(ctx=keys.number("cutoff_len"))
    keys.implied |= {"ctx": 2048, "gradient_checkpointing": not keys.flag("disable_gradient_checkpointing")}
    _attention(keys)
    _method(keys)
    _stage(keys)
    if keys.flag("use_galore"):
        keys.put(optimizer="galore_adamw")
    if keys.flag("use_apollo"):
        keys.put(optimizer="apollo_adamw")
    if keys.flag("packing"):
        keys.notes.append(f"{keys.file}: packed sequences count as batch × ctx of one length")
    keys.finish(NO_MATTER, UNCOUNTED)


def _attention(keys: Keys) -> None:
    word = keys.text("flash_attn")
    word = "disabled" if word == "false" else "fa2" if word == "true" else word
    keys.put(attention=ATTENTION.get(word or ""))
    if word and word not in ATTENTION:
        keys.unknown.append(keys.told("flash_attn", word))


def _method(keys: Keys) -> None:
    """Full, or LoRA with what quantizes it; trainable weights are cast to fp32 beside bf16, unless all is bf16."""
    kind = keys.text("finetuning_type") or "lora"
    pure = keys.flag("pure_bf16")
    mixed = keys.options.get("mixed_precision", "no")
    if pure:
        keys.put(dtype="bf16", mixed_precision="no")
    elif mixed != "no":
        keys.put(dtype="fp32" if kind == "full" else mixed)
    ranks = {
        "lora_r": keys.number("lora_rank"),
        "lora_targets": targets(keys, "lora_target"),
        "lora_dropout": keys.share("lora_dropout"),
        "modules_to_save": keys.words("additional_target"),
        "rslora": keys.flag("use_rslora") or None,
        "dora": keys.flag("use_dora") or None,
    }
    bits, method = keys.number("quantization_bit"), keys.text("quantization_method")
    form, double = keys.text("quantization_type"), keys.flag("double_quantization")
    if kind not in ("lora", "full"):
        keys.unknown.append(keys.told("finetuning_type", kind))
    if kind in ("full", "freeze"):
        if bits:
            keys.notes.append(f"{keys.file} contradicts itself: quantization_bit with {kind}; it is left out")
        return
    keys.put(mode="lora", **ranks)
    keys.implied |= {"lora_r": 8, "lora_targets": "all-linear", "adapter_dtype": "bf16" if pure else "fp32"}
    if bits and (method not in (None, "bnb", "bitsandbytes") or bits not in (4, 8)):
        keys.unknown.append(keys.told("quantization_bit", f"{bits} by {method or 'bnb'}"))
    elif bits:
        quantized(keys, bits == 4, bits == 8, form, True if double is None else double)


def _stage(keys: Keys) -> None:
    stage = keys.text("stage") or "sft"
    if stage in ("dpo", "rm", "kto"):
        keys.put(batch=2 * int(keys.options.get("batch", 8)))
        beside = "" if stage == "rm" else ", without the reference model that full training keeps beside them"
        keys.notes.append(f"{keys.file}: stage {stage} counts two sequences a pair{beside}")
    elif stage not in ("sft", "pt"):
        keys.unknown.append(keys.told("stage", stage))
