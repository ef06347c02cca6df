"""Decoders and models around them: published counts, facts of architectures, and the meta device's own tensors."""

import json
import os
from collections import Counter
from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.infer import infer
from hfvram.model.layers import Attention, CompressedAttention, LatentAttention, MixtureOfExperts

LLAMA = {"model_type": "llama", "vocab_size": 32000}
MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "factor": 40}}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}

# Totals as their authors or the Hub publish them; what a configuration leaves out is its family's default.
PUBLISHED: list[tuple[str, dict[str, Any], int]] = [
    ("Llama 2 7B", LLAMA, 6_738_415_616),
    (
        "Llama 3 8B",
        {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
        8_030_261_248,
    ),
    ("Mistral 7B", {"model_type": "mistral"}, 7_241_732_096),
    (
        "Qwen2.5 7B",
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    ),
    ("Mixtral 8x7B", MIXTRAL, 46_702_792_704),
    ("Qwen3 30B-A3B", QWEN3_30B, 30_532_122_624),
    ("gpt-oss 20B", GPT_OSS_20B, 20_914_757_184),
    ("DeepSeek-V3", DEEPSEEK_V3, 671_026_404_352),
    (
        "OLMoE 7B",
        {"model_type": "olmoe", "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
        6_919_161_856,
    ),
    ("GPT-2", {"model_type": "gpt2"}, 124_439_808),
    ("GPT-2 XL", {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
    ("GPT-J 6B", {"model_type": "gptj"}, 6_050_882_784),
    (
        "Phi-2",
        {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32},
        2_779_683_840,
    ),
    ("Phi-3 mini", {"model_type": "phi3"}, 3_821_079_552),
    ("Falcon 7B", {"model_type": "falcon"}, 6_921_720_704),
    (
        "MPT 7B",
        {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
        6_649_286_656,
    ),
    ("BLOOM 176B", {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "n_head": 112}, 176_247_271_424),
    ("Gemma 7B", {"model_type": "gemma"}, 8_537_680_896),
    ("Gemma 2 2B", {"model_type": "gemma2"}, 2_614_341_888),
]


@pytest.mark.parametrize(("config", "count"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED])
def test_published_counts(config: dict[str, Any], count: int) -> None:
    assert infer({"vocab_size": 50400, **config} if config["model_type"] == "gptj" else config).parameters == count


def attentions(architecture: Architecture) -> list[Attention]:
    return [m for layer in architecture.text.layers for m in layer.mixers if isinstance(m, Attention)]


def windows(config: dict[str, Any]) -> Counter[int | None]:
    return Counter(a.window for a in attentions(infer(config)))


def test_head_size_is_the_configurations_own() -> None:
    """Qwen3-0.6B: 1024 ÷ 16 = 64, but its heads are 128 wide."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
    assert attentions(infer({"model_type": "qwen3", **sizes, "head_dim": 128}))[0].head_dim == 128
    assert attentions(infer({"model_type": "llama", **sizes}))[0].head_dim == 64


def test_latent_attention_keeps_one_vector_and_its_rotary_part() -> None:
    """DeepSeek-V3: 61 layers of 512 + 64 bf16 elements are 70,272 B a token; expanded heads 4,997,120 B (MEMORY.md)."""
    mixers = [m for layer in infer(DEEPSEEK_V3).text.layers for m in layer.mixers if isinstance(m, LatentAttention)]
    assert sum(2 * (m.kv_lora_rank + m.qk_rope_head_dim) for m in mixers) == 70_272
    assert sum(2 * m.heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim) for m in mixers) == 4_997_120


def test_windows() -> None:
    """A window with no pattern key (Mistral), with a null (later Mistrals), with a switch (Qwen), and with patterns."""
    assert windows({"model_type": "mistral", "sliding_window": 4096}) == {4096: 32}
    assert windows({"model_type": "mistral"}) == {4096: 32}  # MistralConfig's own default
    assert windows({"model_type": "mistral", "sliding_window": None}) == {None: 32}
    assert windows({"model_type": "qwen2", "sliding_window": 32768}) == {None: 32}
    assert windows({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 20}) == {None: 20, 4096: 12}
    assert windows({"model_type": "gemma2"}) == {4096: 13, None: 13}
    gemma3 = {"num_hidden_layers": 62, "sliding_window": 1024, "sliding_window_pattern": 6}
    assert windows({"model_type": "gemma3_text", **gemma3}) == {1024: 52, None: 10}
    assert windows({"model_type": "gemma3", "text_config": gemma3}) == {1024: 52, None: 10}
    assert windows(GPT_OSS_20B) == {128: 12, None: 12}
    assert windows({"model_type": "cohere2"}) == {4096: 30, None: 10}
    assert windows({"model_type": "phi3", "sliding_window": 2047}) == {2047: 32}
    kinds = ["full_attention"] + 2 * ["sliding_attention"]
    assert windows({"model_type": "olmo3", "num_hidden_layers": 3, "layer_types": kinds}) == {None: 1, 4096: 2}


def test_chunked_attention_has_rotary_positions_and_full_attention_none() -> None:
    """Llama 4: every fourth layer attends to everything, without positions."""
    found = attentions(infer({"model_type": "llama4", "text_config": {"num_hidden_layers": 48}}))
    assert Counter((a.kind, a.window, a.rotary is None) for a in found) == {
        ("chunked_attention", 8192, False): 36,
        ("full_attention", None, True): 12,
    }


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    # Mixtral: 32 layers x 6 idle experts x 3 x 4096 x 14336 less than the total.
    assert infer(MIXTRAL).active_parameters == 12_879_925_248
    # Qwen3-30B-A3B: 30,532,122,624 - 48 x 120 x 3 x 2048 x 768.
    assert infer(QWEN3_30B).active_parameters == 3_353_032_704
    # DeepSeek-V3: 671,026,404,352 - 58 x 248 x 3 x 7168 x 2048; its first 3 layers are dense, 1 expert is shared.
    assert infer(DEEPSEEK_V3).active_parameters == 37_552_282_624
    # gpt-oss: each of 28 idle experts has biases, too: 24 x 28 x (3 x 2880 x 2880 + 3 x 2880).
    assert infer(GPT_OSS_20B).active_parameters == 20_914_757_184 - 24 * 28 * (3 * 2880 * 2880 + 3 * 2880)


def test_dense_layers_before_and_between_mixtures() -> None:
    def mixtures(config: dict[str, Any]) -> str:
        layers = infer(config).text.layers
        return "".join("E" if isinstance(layer.feed_forward, MixtureOfExperts) else "d" for layer in layers)

    assert mixtures(DEEPSEEK_V3) == "ddd" + 58 * "E"
    few = {"num_hidden_layers": 6}
    assert mixtures({"model_type": "qwen3_moe", **few, "decoder_sparse_step": 2, "mlp_only_layers": [3]}) == "dEdddE"
    assert mixtures({"model_type": "llama4", "text_config": {**few, "interleave_moe_layer_step": 2}}) == "dEdEdE"
    assert mixtures({"model_type": "glm_moe_dsa", **few, "mlp_layer_types": 2 * ["dense"] + 4 * ["sparse"]}) == "ddEEEE"


def test_shared_experts_are_one_width() -> None:
    deepseek = infer({"model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_shared_experts": 2}).moe
    assert deepseek is not None
    assert deepseek.shared_intermediate_size == 2816
    qwen = infer({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 20480}).moe
    assert qwen is not None
    assert qwen.shared_intermediate_size == 20480


def test_layers_that_share_keys_and_values_keep_none() -> None:
    """Gemma 4 E2B: 15 of 35 layers have keys and values; those after them have twice the feed-forward."""
    text = {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": ["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(35)],
    }
    gemma = infer({"model_type": "gemma4", "text_config": text})
    assert Counter(a.cached for a in attentions(gemma)) == {True: 15, False: 20}
    assert Counter((a.kind, a.head_dim) for a in attentions(gemma)) == {
        ("sliding_attention", 256): 28,
        ("full_attention", 512): 7,
    }
    widths = [layer.feed_forward.intermediate_size for layer in gemma.text.layers if layer.feed_forward]
    assert widths == 15 * [6144] + 20 * [12288]


def test_towers_are_stacks_of_their_own_beside_the_nested_text_model() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64, "num_attention_heads": 4},
    }
    llava = infer(config)
    assert [stack.name for stack in llava.stacks] == ["vision", "projector", "text"]
    assert (llava.vocab_size, llava.hidden_size, len(llava.text.layers)) == (32064, 4096, 32)
    assert not any(m.cached for layer in llava.stack("vision").layers for m in layer.mixers if isinstance(m, Attention))


def test_unknown_nested_models_are_named() -> None:
    vision = {"model_type": "clip_vision_model"}
    with pytest.raises(HfvramError, match="martian") as caught:
        infer({"model_type": "llava", "text_config": {"model_type": "martian"}, "vision_config": vision})
    assert caught.value.kind == "unknown_architecture"
    with pytest.raises(HfvramError, match="venusian"):
        infer(
            {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"model_type": "venusian"}}
        )


def test_what_attention_can_run() -> None:
    def implementations(model_type: str) -> tuple[str, ...]:
        return attentions(infer({"model_type": model_type}))[0].implementations

    assert implementations("llama") == ("sdpa", "flash_attention_2", "eager")
    assert implementations("gpt_oss") == ("eager", "flash_attention_2")
    assert implementations("bloom") == implementations("mpt") == ("eager",)
    assert implementations("gptj") == ("eager", "flash_attention_2")
    assert implementations("llama4") == ("sdpa", "eager")


def test_norms_and_branches() -> None:
    def layer(model_type: str) -> tuple[str, str, bool]:
        first = infer({"model_type": model_type}).text.layers[0]
        return first.norm, first.norm_position, first.parallel

    assert layer("llama") == ("rms", "pre", False)
    assert layer("olmo2") == ("rms", "post", False)
    assert layer("gemma2") == layer("glm4") == ("rms", "both", False)
    assert layer("phi") == layer("cohere") == layer("gptj") == layer("falcon") == ("layer", "pre", True)


def test_positions() -> None:
    def first(config: dict[str, Any]) -> Attention:
        return attentions(infer(config))[0]

    assert first({"model_type": "phi"}).rotary is not None
    phi = first({"model_type": "phi", "head_dim": 80}).rotary
    assert phi is not None
    assert phi.dim == 40  # half of each head
    assert first({"model_type": "bloom"}).position_bias
    assert first({"model_type": "gpt2"}).rotary is None
    glm = first({"model_type": "glm", "head_dim": 128}).rotary
    assert glm is not None
    assert (glm.dim, glm.style) == (64, "interleaved")
    rotating = [a.rotary is not None for a in attentions(infer({"model_type": "smollm3", "num_hidden_layers": 8}))]
    assert rotating == [True, True, True, False] * 2


def test_large_buffers_are_there() -> None:
    """GPT-BigCode keeps a causal mask of all positions, GPT-J a table in every layer, GPT-Neo a mask in every layer."""

    def buffers(config: dict[str, Any]) -> Counter[tuple[int, ...]]:
        return Counter(p.shape for p in infer(config).all_params if p.kind == "buffer")

    assert buffers({"model_type": "gpt_bigcode", "n_positions": 8192}) == {(8192, 8192): 1}
    assert buffers({"model_type": "gptj"}) == {(2048, 64): 28}
    assert buffers({"model_type": "gpt_neo"}) == {(1, 1, 2048, 2048): 24}


def test_compressed_attention() -> None:
    """DeepSeek-V4: windows of 128, 4 or 128 older tokens in one entry, an indexer where it is 4."""
    config = {"model_type": "deepseek_v4", "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]}
    mixers = [m for layer in infer(config).text.layers for m in layer.mixers]
    assert all(isinstance(m, CompressedAttention) for m in mixers)
    found = [(m.kind, m.rate, m.index_heads) for m in mixers if isinstance(m, CompressedAttention)]
    assert found == [
        ("sliding_attention", 0, 0),
        ("compressed_sparse_attention", 4, 64),
        ("heavily_compressed_attention", 128, 0),
        ("compressed_sparse_attention", 4, 64),
    ]


def test_only_some_layers_have_an_indexer() -> None:
    config = {"model_type": "glm_moe_dsa", "num_hidden_layers": 5, "indexer_types": ["full", "full", *3 * ["shared"]]}
    mixers = [m for layer in infer(config).text.layers for m in layer.mixers if isinstance(m, LatentAttention)]
    assert [bool(m.index_heads) for m in mixers] == [True, True, False, False, False]
    assert {m.index_top_k for m in mixers} == {2048}


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size"),
    ({"model_type": "llama", "num_hidden_layers": -1}, "num_hidden_layers"),
    ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"model_type": "llama", "hidden_size": 4097}, "4097"),
    ({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 5}, "KV heads"),
    ({"model_type": "llama", "attention_bias": "yes"}, "attention_bias"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok"),
    ({"model_type": "gpt2", "n_layer": 2.5}, "num_hidden_layers"),
    ({"model_type": "gpt_neo", "attention_types": [["global", 24]]}, "attention_types"),
    ({"model_type": "gemma4", "text_config": {"num_kv_shared_layers": 31}}, "share"),
    ({"model_type": "deepseek_v4", "compress_ratios": [7]}, "compress_ratios"),
    ({"model_type": "llava", "text_config": ["llama"]}, "text_config"),
    ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("config", "named"), NONSENSE, ids=[n[1] for n in NONSENSE])
def test_nonsense_is_a_bad_config(config: dict[str, Any], named: str) -> None:
    with pytest.raises(HfvramError, match=named) as caught:
        infer(config)
    assert caught.value.kind == "bad_config"


def test_a_layer_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(HfvramError, match="warp_attention") as caught:
        infer({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["warp_attention"]})
    assert caught.value.kind == "unknown_architecture"


# The rest compares names, shapes and kinds with what transformers builds of the same configuration on the meta device.
SMALL = {
    "vocab_size": 200_000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT = {"vocab_size": 60_000, "n_embd": 32, "n_layer": 3, "n_head": 4}
VIT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {**VIT, "image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 3, "num_heads": 4, "hidden_size": 32, "intermediate_size": 20, "out_hidden_size": 32}
MLA = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "index_n_heads": 3,
    "index_head_dim": 8,
}
V4 = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "q_lora_rank": 12,
    "head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 6,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "num_key_value_heads": 1,
}
BIASED = {"attention_bias": True, "mlp_bias": True}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


MULTI = without(SMALL, "num_key_value_heads")
BUILT: list[tuple[str, dict[str, Any], str | None]] = [
    *((t, SMALL, None) for t in ("llama", "mistral", "qwen2", "granite", "arcee", "smollm3", "olmo", "olmo2", "olmo3")),
    *(
        (t, SMALL, None)
        for t in ("qwen3", "cwm", "seed_oss", "ernie4_5", "nanochat", "nemotron", "exaone4", "ministral3")
    ),
    *((t, SMALL, None) for t in ("gemma", "gemma2", "gemma3_text", "phi", "phi3", "starcoder2", "stablelm", "cohere")),
    *((t, SMALL, None) for t in ("cohere2", "glm", "glm4", "granitemoe", "phimoe", "mixtral")),
    *((t, {**SMALL, "head_dim": 8}, None) for t in ("ministral", "hunyuan_v1_dense", "helium")),
    ("llama", {**SMALL, **BIASED, "head_dim": 10, "tie_word_embeddings": True}, None),
    ("llama", {**SMALL, **BIASED}, "LlamaForQuestionAnswering"),
    ("llama", {**SMALL, "id2label": {"0": "a", "1": "b", "2": "c"}}, "LlamaForSequenceClassification"),
    ("mistral", SMALL, "MistralForTokenClassification"),
    ("qwen3", {**SMALL, "attention_bias": True}, "Qwen3Model"),
    ("gemma2", SMALL, "Gemma2ForSequenceClassification"),
    ("cohere", {**SMALL, "use_qk_norm": True}, None),
    ("stablelm", {**SMALL, "qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True}, None),
    ("phi", {**SMALL, "qk_layernorm": True}, None),
    ("glm", {**SMALL, "attention_bias": True}, None),
    ("minimax_m2", {**SMALL, "num_local_experts": 8}, None),
    ("olmoe", {**SMALL, "num_experts": 8}, None),
    ("qwen2_moe", {**SMALL, "num_experts": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2}, None),
    ("qwen3_moe", {**SMALL, "num_experts": 8, "mlp_only_layers": [1]}, None),
    ("granitemoeshared", {**SMALL, "num_local_experts": 6, "shared_intermediate_size": 24}, None),
    ("gpt_oss", {**SMALL, "num_local_experts": 6}, None),
    ("glm4_moe", {**SMALL, "n_routed_experts": 8, "first_k_dense_replace": 2, "use_qk_norm": True}, None),
    ("ernie4_5_moe", {**SMALL, "moe_num_experts": 8, "moe_layer_interval": 2, "use_bias": True}, None),
    ("deepseek_v2", {**SMALL, **MLA, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}, None),
    ("deepseek_v3", {**SMALL, **MLA, "first_k_dense_replace": 1, "n_shared_experts": 2, "attention_bias": True}, None),
    ("deepseek_v3", {**SMALL, **MLA, "q_lora_rank": None}, None),
    ("deepseek_v32", {**SMALL, **MLA}, None),
    ("glm_moe_dsa", {**SMALL, **MLA, "index_topk_freq": 2}, None),
    ("glm4_moe_lite", {**SMALL, **MLA}, None),
    ("minicpm3", {**SMALL, **MLA}, None),
    ("deepseek_v4", {**without(SMALL, "intermediate_size"), **V4, "compress_ratios": [0, 4, 128, 4]}, None),
    ("deepseek_v4", {**without(SMALL, "intermediate_size"), **V4}, None),
    ("gpt2", GPT, None),
    ("gpt2", {**GPT, "n_inner": 50, "tie_word_embeddings": False}, None),
    ("gpt2", GPT, "GPT2ForTokenClassification"),
    ("gpt_bigcode", GPT, None),
    ("gpt_bigcode", {**GPT, "multi_query": False}, None),
    ("gptj", {**GPT, "rotary_dim": 4}, None),
    ("codegen", {**GPT, "rotary_dim": 4}, None),
    (
        "gpt_neo",
        {**without(MULTI, "num_hidden_layers"), "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
        None,
    ),
    ("gpt_neox", {**MULTI, "use_parallel_residual": False, "attention_bias": False}, None),
    ("opt", {**MULTI, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": 40}, None),
    ("opt", {**MULTI, "ffn_dim": 40, "enable_bias": False}, None),
    ("bloom", {"vocab_size": 60_000, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
    ("falcon", MULTI, None),
    ("falcon", {**MULTI, "num_kv_heads": 2, "new_decoder_architecture": True}, None),
    ("falcon", {**MULTI, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}, None),
    ("falcon", MULTI, "FalconForTokenClassification"),
    ("mpt", {"vocab_size": 60_000, "d_model": 32, "n_heads": 4, "n_layers": 2}, None),
    (
        "dbrx",
        {
            "vocab_size": 200_000,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "rope_theta": 1e4,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
        },
        None,
    ),
    (
        "llava",
        {
            "text_config": {"model_type": "llama", **SMALL},
            "vision_config": {"model_type": "clip_vision_model", **PICTURE},
        },
        None,
    ),
    (
        "llava",
        {
            "text_config": {"model_type": "qwen2", **SMALL},
            "vision_config": {"model_type": "siglip_vision_model", **PICTURE},
            "vision_feature_layer": [-2, -1],
            "multimodal_projector_bias": False,
        },
        "LlavaModel",
    ),
    (
        "mistral3",
        {"text_config": {"model_type": "mistral", **SMALL}, "vision_config": {"model_type": "pixtral", **PICTURE}},
        None,
    ),
    ("gemma3", {"text_config": {**SMALL, "head_dim": 16}, "vision_config": PICTURE}, None),
    ("qwen2_vl", {"text_config": SMALL, "vision_config": {**QWEN_TOWER, "embed_dim": 16}}, None),
    ("qwen2_vl", {**SMALL, "vision_config": {**QWEN_TOWER, "embed_dim": 16}}, None),
    ("qwen2_5_vl", {"text_config": SMALL, "vision_config": QWEN_TOWER, "tie_word_embeddings": True}, None),
    ("qwen3_vl", {"text_config": SMALL, "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0, 1]}}, None),
    ("qwen3_vl_moe", {"text_config": {**SMALL, "num_experts": 8}, "vision_config": QWEN_TOWER}, None),
    ("glm4v", {"text_config": SMALL, "vision_config": {**QWEN_TOWER, "image_size": 28}}, None),
    (
        "glm4v_moe",
        {"text_config": {**SMALL, "n_routed_experts": 8}, "vision_config": {**QWEN_TOWER, "image_size": 28}},
        None,
    ),
    (
        "llama4",
        {
            "pad_token_id": 1,
            "text_config": {
                **SMALL,
                "intermediate_size_mlp": 40,
                "num_local_experts": 4,
                "head_dim": 8,
                "interleave_moe_layer_step": 2,
            },
            "vision_config": {
                **PICTURE,
                "projector_input_dim": 24,
                "projector_output_dim": 24,
                "vision_output_dim": 24,
            },
        },
        None,
    ),
    ("llama4_text", {**SMALL, "intermediate_size_mlp": 40, "num_local_experts": 4, "head_dim": 8}, None),
    (
        "mllama",
        {
            "pad_token_id": 1,
            "text_config": {**SMALL, "cross_attention_layers": [1, 3]},
            "vision_config": {
                **without(PICTURE, "num_attention_heads"),
                "attention_heads": 4,
                "num_global_layers": 1,
                "vision_output_dim": 192,
            },
        },
        None,
    ),
    (
        "gemma4",
        {
            "text_config": {
                **SMALL,
                "num_kv_shared_layers": 1,
                "head_dim": 8,
                "hidden_size_per_layer_input": 6,
                "use_double_wide_mlp": True,
                "global_head_dim": 16,
                "layer_types": 2 * ["sliding_attention", "full_attention"],
            },
            "vision_config": {**VIT, "head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 50},
            "audio_config": {**without(VIT, "intermediate_size"), "output_proj_dims": 20},
        },
        None,
    ),
    (
        "gemma4_text",
        {
            **SMALL,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 20,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "head_dim": 8,
            "hidden_size_per_layer_input": 0,
        },
        None,
    ),
    (
        "kimi_k25",
        {
            "text_config": {"model_type": "kimi_k2", **SMALL, **MLA, "first_k_dense_replace": 1},
            "vision_config": {**VIT, "pos_emb_height": 4, "pos_emb_width": 4},
            "projection_hidden_size": 32,
        },
        None,
    ),
    (
        "minicpmv4_6",
        {"text_config": {"model_type": "qwen2", **SMALL}, "vision_config": PICTURE, "merger_times": 2},
        None,
    ),
    (
        "qwen2_audio",
        {
            "text_config": {"model_type": "qwen2", **SMALL},
            "audio_config": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 40},
        },
        None,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "config", "class_name"), BUILT, ids=[f"{b[0]}-{b[2] or i}" for i, b in enumerate(BUILT)]
)
def test_the_meta_device_builds_the_same(model_type: str, config: dict[str, Any], class_name: str | None) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    read = reader(model_type)
    assert read is not None
    mine = read(Config(json.loads(json.dumps({**config, "model_type": model_type}))), class_name)
    built_from = transformers.CONFIG_MAPPING[model_type](**json.loads(json.dumps(config)))
    with torch.device("meta"):
        model = getattr(transformers, mine.class_name)._from_config(built_from, dtype=torch.bfloat16)

    parameters = {p.name: p.shape for p in mine.all_params if p.kind != "buffer"}
    assert parameters == {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = {
        f"{n}.weight" for n, m in model.named_modules() if type(m) is torch.nn.Linear or type(m).__name__ == "Conv1D"
    }
    heads = {p.name for p in mine.all_params if p.kind == "head"}
    assert {p.name for p in mine.all_params if p.kind == "linear"} == (linears & parameters.keys()) - heads
    derived = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - linears
    assert {p.name for p in mine.all_params if p.kind == "linear_subclass"} == derived
    buffers = {n: (tuple(b.shape), b.numel() * b.element_size()) for n, b in model.named_buffers()}
    mine_buffers = {p.name: p.shape for p in mine.all_params if p.kind == "buffer"}
    assert all(buffers[name][0] == shape for name, shape in mine_buffers.items())
    assert {name for name, (_, nbytes) in buffers.items() if nbytes > 65536} <= mine_buffers.keys()
    assert sum(p.numel() for p in model.parameters()) == mine.parameters
