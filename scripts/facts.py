#!/usr/bin/env python3
"""Boil published `config.json` files down to the facts that decide architecture and memory.

    python scripts/facts.py FOLDER PARAMETERS.tsv INDEX.tsv [--only TEXT]

FOLDER holds `org__name.json` files, PARAMETERS.tsv (file, model_type, class, parameters) the count that transformers
builds from each, INDEX.tsv (file, hub_id, …) their Hub ids. Each trimmed configuration is built on the meta device and
must still have that count. Writes fixtures/configs/facts.jsonl and, for what transformers has no code for,
fixtures/configs/refused.jsonl.
"""

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures" / "configs"

NOISE = re.compile(
    r"_.*|.*_token(_id|_ids|_index)?|.*_placeholder|auto_map|.*transformers_version|unsloth_.*|name|language"
    r"|init_(?!pos_emb).*|initializer_.*|.*_init|rescale_prenorm_residual|.*_loss.*|.*_cost|aux.*|seq_aux|eos_coefficient"
    r"|.*eps|.*epsilon|.*_multiplier|.*_scaling|.*_scale|scale_.*|alpha|swiglu_limit|.*logit_scale.*|rope_theta|.*_base_freq"
    r"|time_step_(?!rank).*|.*jitter.*|summary_.*|mask_(?!(time|feature)_prob).*|apply_spec_augment|task_specific_params"
    r"|max_length|min_length|.*num_beams|num_beam_groups|.*_penalty|early_stopping|top_[kp]|typical_p|temperature|do_sample"
    r"|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|suppress_tokens|forced_.*|force_.*|num_return_sequences"
    r"|remove_invalid_values|output_(attentions|hidden_states|scores|past|activations|router_logits)|return_dict.*|prefix"
    r"|finetuning_task|problem_type|torchscript|use_bfloat16|tokenizer_.*|pruned_heads|tie_encoder_decoder|tf_legacy_loss"
    r"|pretraining_tp|cache_implementation|chunk_size_feed_forward|verbose|gradient_checkpointing|ep_size|ignore_index"
    r"|fan_mode|move_model_to_device|jax|.*_fixed|inference_runner|.*validate_runner.*|.*_config_dict|num_logits_to_keep"
    r"|block_.*init.*|.*_use_xavier_init|conv_use_xavier_init|dim_model_base|gradient_clipping|for_llm_compressor|emb_init.*"
    r"|class_cost|ctc_.*|.*attention_invalid.*|label2id|mm_(?!tokens|hidden_size|projector_type).*|freeze_.*|tune_.*|unfreeze_.*"
    r"|image_aspect_ratio|norm_epsilon|interpolate_factor|use_unified_.*|seconds_per_chunk"
    r"|position_id_per_seconds|tokens_per_second|softmax_scale|max_batch_size|video_seq_length|image_seq_length|standardize"
)
"""Keys that change no size and no operation that costs memory: ids of tokens, initialization, scales, generation."""

KEPT = {"rope_scaling", "decoder_sparse_step", "image_token_id"}
QUANTIZATION_NOISE = re.compile(
    r"_.*|producer|damp_percent|true_sequential|model_.*|.*observer.*|actorder|version|llm_int8_(?!skip).*"
)
LONG_LIST = 16


def trim(config: Mapping[str, Any], defaults: Any = None) -> dict[str, Any]:
    """The facts of one configuration; against `defaults`, its class at its defaults, null and 0 are facts too."""
    facts: dict[str, Any] = {}
    for key, value in config.items():
        if key == "id2label" and isinstance(value, Mapping):
            facts["num_labels"] = len(value)
        elif key in ("quantization_config", "quantization") and isinstance(value, Mapping):
            facts[key] = trim_quantization(value)
        elif NOISE.fullmatch(key) and key not in KEPT and not (key == "rope_theta" and "kv_n_heads" in config):
            continue  # DBRX's attention configuration cannot be built without its base
        elif "drop" in key:
            if value or getattr(defaults, key, 0):
                facts[key] = value
        elif value is None:
            if key != "rope_scaling" and getattr(defaults, key, None) is not None:
                facts[key] = None
        elif (key == "use_cache" and value) or (key == "is_encoder_decoder" and not value):
            continue
        elif isinstance(value, Mapping) and (key.endswith("_config") or key in ("ffn_config", "attn_config")):
            facts[key] = trim(value, getattr(defaults, key, None))
        else:
            facts[key] = value
    return facts


def trim_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Method, bits and exceptions of a quantization; names that repeat in every layer are folded to `layers.*.name`."""
    facts: dict[str, Any] = {}
    for key, value in config.items():
        if value is None or QUANTIZATION_NOISE.fullmatch(key):
            continue
        if isinstance(value, list) and len(value) > LONG_LIST and all(isinstance(v, str) for v in value):
            facts[key] = folded(value)
        elif key == "quantized_layers":
            by_value = defaultdict(list)
            for name, how in value.items():
                by_value[json.dumps(how)].append(name)
            facts[key] = {name: json.loads(how) for how, names in by_value.items() for name in folded(names)}
        elif isinstance(value, Mapping):
            facts[key] = trim_quantization(value)
        else:
            facts[key] = value
    return facts


def folded(names: Iterable[str]) -> list[str]:
    """Names with a layer number folded to `*` where at least four layers have them, in their first order."""
    layers = defaultdict(list)
    for name in names:
        layers[re.sub(r"\.\d+(?=[.*]|$)", ".*", name, count=1)].append(name)
    out: list[str] = []
    for pattern, members in layers.items():
        whole_layer = pattern.endswith((".*", ".**"))  # `layers.0*` is one layer, `layers.**` would be all
        out += members if len(members) < 4 or whole_layer else [pattern]
    return out


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder", type=Path)
    args.add_argument("parameters", type=Path)
    args.add_argument("index", type=Path)
    args.add_argument("--only", default="")
    a = args.parse_args()

    from catalogue import meta_parameters
    from transformers import CONFIG_MAPPING

    built = {r["file"]: r for r in csv.DictReader(a.parameters.open(), delimiter="\t")}
    ids = {r["file"]: r["hub_id"] for r in csv.DictReader(a.index.open(), delimiter="\t")}
    facts, refused, wrong = [], [], 0
    for path in sorted(a.folder.glob("*.json")):
        if a.only not in path.name:
            continue
        config = json.loads(path.read_text())
        row, hub_id = built.get(path.name), ids[path.name]
        if row is None:
            named = {k: config[k] for k in ("model_type", "architectures") if k in config}
            refused.append({"id": hub_id, **named})
            continue
        trimmed = trim(config, CONFIG_MAPPING[row["model_type"]]() if row["model_type"] in CONFIG_MAPPING else None)
        want = int(row["parameters"])
        try:
            got = sum(n for _, _, n in meta_parameters(trimmed, row["class"]))
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        if got != want:
            wrong += 1
            print(f"{hub_id}: {got} parameters, not {want}", file=sys.stderr)
        facts.append({"id": hub_id, "class": row["class"], "parameters": want, "config": trimmed})
    if not a.only:
        FIXTURES.mkdir(parents=True, exist_ok=True)
        for name, rows in (("facts.jsonl", facts), ("refused.jsonl", refused)):
            lines = [json.dumps(r, separators=(",", ":")) for r in rows]
            (FIXTURES / name).write_text("\n".join(lines) + "\n")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
