"""The formula's cache against transformers' own cache object, byte for byte: tiny models that really generate."""

from typing import Any

import pytest
import small

from hfvram.answer.resolve import resolve
from hfvram.memory.formula import timeline
from hfvram.model.identify import identify
from hfvram.model.infer import infer
from hfvram.read.checkpoint import Checkpoint
from hfvram.request import Request

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
INDEXED = LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRANSLATES = small.BART | {
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = small.T5 | {"decoder_start_token_id": 0}
V4 = {
    "head_dim": 16,
    "num_key_value_heads": 1,
    "layer_types": [
        "sliding_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "hc_mult": 2,
    "qk_rope_head_dim": 8,
    "num_hash_layers": 1,
}
GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
WINDOWED = (
    *("mistral", "ministral", "qwen2", "qwen3", "cwm", "smollm3", "olmo3", "exaone4", "gemma2", "gemma3_text", "phi3"),
    *("starcoder2", "cohere2", "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss"),
)
PLAIN = (
    *("llama", "granite", "arcee", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "nanochat", "nemotron", "olmo", "olmo2"),
    *("gemma", "phi", "stablelm", "cohere", "glm", "glm4", "minimax_m2", "olmoe", "granitemoe", "granitemoeshared"),
    *("glm4_moe", "ernie4_5_moe", "gpt_neox", "bloom"),
)
CASES: dict[str, dict[str, Any]] = {
    **{name: SIZES | EXPERTS | WINDOW | {"head_dim": 16} for name in WINDOWED},
    **{name: SIZES | EXPERTS | {"head_dim": 8} for name in PLAIN},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"), SIZES | EXPERTS | LATENT),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), SIZES | EXPERTS | INDEXED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), GPT),
    **dict.fromkeys(("gptj", "codegen"), GPT | {"rotary_dim": 4}),
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 128,
        "window_size": 16,
    },
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 64, "max_seq_len": 128},
    "llama4_text": SIZES | EXPERTS | {"head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48},
    "gemma4_text": SIZES | WINDOW | GEMMA4,
    "deepseek_v4": SIZES | EXPERTS | WINDOW | V4,
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100"), TRANSLATES),
}
NO_STATIC = {"mpt", "deepseek_v4", "llama4_text"}
"""No cache at all; and what generate() of transformers 5.17 itself fails at with a static one."""


def reachable_bytes(cache: Any) -> int:
    """Bytes of every tensor storage that the cache object leads to, each once."""
    import torch

    seen: dict[int, int] = {}
    visited: set[int] = set()
    todo = [cache]
    while todo:
        item = todo.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif type(item).__module__.startswith("transformers") and hasattr(item, "__dict__"):
            todo += [value for key, value in vars(item).items() if key != "config"]
    return sum(seen.values())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
def test_cache_is_what_transformers_holds(name: str, cache: str) -> None:
    import torch
    import transformers

    if cache == "static" and name in NO_STATIC:
        pytest.skip("transformers has no static cache for it")
    values = CASES[name] | {"model_type": name}
    architecture = identify(Checkpoint(id="tiny", source="local", config=values), infer(values, None)).architecture
    config = transformers.AutoConfig.for_model(name, **CASES[name])
    torch.manual_seed(0)
    model = getattr(transformers, architecture.class_name)._from_config(config, dtype=torch.float32).eval()
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    done = model.generate(
        torch.randint(3, 60, (2, 41)),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )
    request = Request(ctx=49, batch=2, new_tokens=8, dtype="fp32", cache=cache)
    written = timeline(architecture, resolve(architecture, request)[0])
    assert written.cache_bytes == reachable_bytes(getattr(done, "past_key_values", None))
