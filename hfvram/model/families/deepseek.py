"""DeepSeek-V2 and -V3, V3.2 and GLM-5 with sparse attention, GLM-4-MoE-Lite, MiniCPM3: multi-head latent attention.

Source: transformers 5.17, models/{deepseek_v2, deepseek_v3, deepseek_v32, glm_moe_dsa, glm4_moe_lite, minicpm3}.
"""

from functools import cache
from typing import Literal

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import llama, moe
from hfvram.model.families.common import layer_kinds
from hfvram.model.families.defaults import opened
from hfvram.model.layers import LatentAttention, linear, norm

SPARSE = ("deepseek_v32", "glm_moe_dsa")


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    return llama.decoder(config, class_name, stack(config, prefix))


def stack(config: Config, prefix: str) -> Stack:
    """The text stack under `prefix`."""
    hidden, layers = config.size("hidden_size"), config.layers("num_hidden_layers")
    layer_kinds(config, layers, ("full_attention", "deepseek_sparse_attention"))
    indexed = indexers(config, layers)

    @cache
    def mixer(indexer: bool) -> LatentAttention:
        return latent_attention(config, hidden, indexer)

    def attend(index: int) -> LatentAttention:
        return mixer(indexed[index])

    if config.model_type == "minicpm3":
        return llama.stack(config, prefix, attend=attend)
    return moe.stack(config, prefix, attend)


def indexers(config: Config, layers: int) -> list[bool]:
    """The layers with an indexer of their own; the others of GLM-5.2 take the choice of the last that has one."""
    if config.model_type not in SPARSE:
        return [False] * layers
    if config.model_type == "deepseek_v32":
        return [True] * layers
    kinds = config.strings("indexer_types")
    pattern = config.get("index_topk_pattern")
    if kinds is None and pattern is not None:
        # A word for each layer, or a letter.
        words = {"F": "full", "S": "shared"}
        letters = [words[c] for c in pattern if c in words] if isinstance(pattern, str) else None
        kinds = letters if letters is not None else config.strings("index_topk_pattern")
    if kinds is None:
        every = config.size("index_topk_freq", default=1, low=0) or 1
        offset = config.size("index_skip_topk_offset", default=2, low=-layers)
        return [max(i - offset + 1, 0) % every == 0 for i in range(layers)]
    if len(kinds) < layers:
        raise HfvramError("bad_config", f"config.json: indexer_types names {len(kinds)} layers of {layers}")
    return [kind == "full" for kind in kinds[:layers]]


def latent_attention(config: Config, hidden: int, indexer: bool) -> LatentAttention:
    heads = config.size("num_attention_heads")
    q_rank, kv_rank = config.size("q_lora_rank", default=0, low=0), config.size("kv_lora_rank")
    nope, rope = config.size("qk_nope_head_dim", low=0), config.size("qk_rope_head_dim")
    value = config.size("v_head_dim", default=0, low=0) or config.divided("hidden_size", hidden, heads)
    bias = config.flag("attention_bias")
    if q_rank:
        queries = (
            linear("self_attn.q_a_proj", hidden, q_rank, bias)
            + norm("self_attn.q_a_layernorm", q_rank)
            + linear("self_attn.q_b_proj", q_rank, heads * (nope + rope))
        )
    else:
        queries = linear("self_attn.q_proj", hidden, heads * (nope + rope))
    params = (
        queries
        + linear("self_attn.kv_a_proj_with_mqa", hidden, kv_rank + rope, bias)
        + norm("self_attn.kv_a_layernorm", kv_rank)
        + linear("self_attn.kv_b_proj", kv_rank, heads * (nope + value))
        + linear("self_attn.o_proj", heads * value, hidden, bias)
    )
    index_heads, index_dim = (config.size("index_n_heads"), config.size("index_head_dim")) if indexer else (0, 0)
    if indexer:
        params += (
            linear("self_attn.indexer.wq_b", q_rank, index_heads * index_dim)
            + linear("self_attn.indexer.wk", hidden, index_dim)
            + norm("self_attn.indexer.k_norm", index_dim, bias=True)
            + linear("self_attn.indexer.weights_proj", hidden, index_heads)
        )
    sparse = config.model_type in SPARSE
    return LatentAttention(
        hidden_size=hidden,
        heads=heads,
        q_lora_rank=q_rank or None,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        rotary_style=_rotary_style(config),
        latent_cache=not sparse,
        index_heads=index_heads,
        index_head_dim=index_dim,
        index_top_k=config.size("index_topk", default=0, low=0) if sparse else 0,
        implementations=("sdpa", "eager") if sparse else ("sdpa", "flash_attention_2", "eager"),
        params=params,
    )


def _rotary_style(config: Config) -> Literal["half", "interleaved", "complex"]:
    if config.model_type == "deepseek_v2":
        return "complex"
    if config.model_type == "minicpm3":
        return "half"
    return "interleaved" if config.flag("rope_interleave", default=True) else "half"
