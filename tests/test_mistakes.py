"""The mistakes that estimators of GPU memory make, each with a real configuration and figures by hand.

The models are those of the built-in catalogue (published configurations). A transformers cache holds ctx − 1 tokens
after generate(); a layer with a window keeps W tokens and a counter of 8 bytes (measured: fixtures/measured).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hub import safetensors

import hfvram
from hfvram.answer.question import Session
from hfvram.request import Request

SESSION = Session()
FACTS = Path(__file__).parents[1] / "fixtures" / "configs" / "facts.jsonl"
BF16, FP32 = 2, 4


def ask(model: str, ctx: int = 8192, **options: Any) -> hfvram.Estimate:
    return SESSION.estimate(model, Request(ctx=ctx, **options), offline=True)


def kv(heads: int, dim: int, e: int = BF16) -> int:
    """Keys and values of one token in one layer."""
    return 2 * heads * dim * e


# --- 1. the head size is what the configuration says


def test_head_dim_is_not_hidden_over_heads() -> None:
    e = ask("Qwen/Qwen3-0.6B")
    assert e.model.head_dim == 128  # 1024 / 16 = 64
    assert e.cache_bytes == 28 * kv(8, 128) * 8191


# --- 2. latent attention: what the engine caches


def test_latent_attention_caches_the_latent() -> None:
    """transformers 5.17 keeps the latent vector and the rotary key: 576 elements a token and layer."""
    assert ask("deepseek-ai/DeepSeek-V2-Lite").cache_bytes == 27 * (512 + 64) * BF16 * 8191 == 254_772_864  # measured
    e = ask("deepseek-ai/DeepSeek-V3")
    assert e.cache_bytes == 70_272 * 8191  # 61 · 576 · 2; full heads of 192 and 128 would be 71 times as much
    assert pytest.approx(71.1, abs=0.1) == 61 * 128 * (192 + 128) * BF16 / 70_272


def test_and_where_it_is_expanded_all_heads() -> None:
    # 64 heads of keys (192 + 64) and values (256), and the sparse attention's index keys of 128
    assert ask("zai-org/GLM-5").cache_bytes == 78 * (64 * (256 + 256) + 128) * BF16 * 8191


# --- 3. windows


def test_windows_are_counted_as_windows() -> None:
    e = ask("google/gemma-3-27b-it", 32768)
    assert e.model.layer_kinds == {"sliding_attention": 52, "full_attention": 10, "dense": 62}
    assert e.cache_bytes == 10 * kv(16, 128) * 32767 + 52 * (kv(16, 128) * 1024 + 8)
    assert 5 < 62 * kv(16, 128) * 32767 / e.cache_bytes < 7


def test_a_window_without_a_pattern_is_that_of_all_layers() -> None:
    assert ask("mistralai/Mistral-7B-v0.1", 32768).cache_bytes == 32 * (kv(8, 128) * 4096 + 8) == 536_871_168
    # the later versions have none
    assert ask("mistralai/Mistral-7B-v0.3", 32768).cache_bytes == 32 * kv(8, 128) * 32767


def test_windows_in_turn_with_full_attention() -> None:
    assert ask("openai/gpt-oss-20b").cache_bytes == 12 * kv(8, 64) * 8191 + 12 * (kv(8, 64) * 128 + 8)


def test_a_window_that_is_not_reached_costs_what_is_there() -> None:
    assert ask("mistralai/Mistral-7B-v0.1", 1024).cache_bytes == 32 * (kv(8, 128) * 1023 + 8)


# --- 4. recurrent layers


def test_a_state_does_not_grow() -> None:
    # convolution: 4 columns of d_inner 5120 and 2 · 128; state: 80 heads · 64 · 128; the checkpoint is in fp32
    state = 64 * ((5120 + 2 * 128) * 4 + 80 * 64 * 128) * FP32
    assert ask("AntonV/mamba2-2.7b-hf").cache_bytes == ask("AntonV/mamba2-2.7b-hf", 131_072).cache_bytes == state


HYBRIDS = {
    # `full_attention_interval` 4 of 48 layers; the state is fp32 in a bf16 model
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        {"full_attention": 12, "gated_delta_net": 36},
        12 * kv(2, 256) * 8191 + 36 * ((2 * 16 * 128 + 32 * 128) * 4 * BF16 + 32 * 128 * 128 * FP32),
    ),
    # `attn_layer_period` 8, `attn_layer_offset` 4 of 32 layers
    "ai21labs/Jamba-v0.1": (
        {"full_attention": 4, "mamba": 28},
        4 * kv(8, 128) * 8191 + 28 * (8192 * 4 * BF16 + 8192 * 16 * FP32),
    ),
    # `attn_layer_indices`
    "ibm-ai-platform/Bamba-9B": (
        {"full_attention": 3, "mamba2": 29},
        3 * kv(8, 128) * 8191 + 29 * ((8192 + 2 * 128) * 4 * BF16 + 128 * 64 * 128 * FP32),
    ),
    # `hybrid_override_pattern`
    "nvidia/Nemotron-H-8B-Base-8K": (
        {"full_attention": 4, "mamba2": 24},
        4 * kv(8, 128) * 8191 + 24 * ((8192 + 2 * 8 * 128) * 4 * BF16 + 128 * 64 * 128 * FP32),
    ),
    # `layers_block_type`: attention stands beside Mamba-2 in 13 of 81 layers
    "Zyphra/Zamba2-7B": (
        {"full_attention": 13, "mamba2": 81},
        13 * kv(32, 224) * 8191 + 81 * ((7168 + 2 * 2 * 64) * 4 * BF16 + 112 * 64 * 64 * FP32),
    ),
    # `layer_types`
    "ibm-granite/granite-4.0-h-tiny": (
        {"full_attention": 4, "mamba2": 36},
        4 * kv(4, 128) * 8191 + 36 * ((3072 + 2 * 128) * 4 * BF16 + 48 * 64 * 128 * FP32),
    ),
    # `full_attn_idxs`; short convolutions keep three columns
    "LiquidAI/LFM2-1.2B": ({"full_attention": 6, "short_conv": 10}, 6 * kv(8, 64) * 8191 + 10 * 2048 * 3 * BF16),
}


@pytest.mark.parametrize("model", HYBRIDS)
def test_hybrids_by_each_pattern_key(model: str) -> None:
    kinds, cache = HYBRIDS[model]
    e = ask(model)
    assert {k: n for k, n in e.model.layer_kinds.items() if k not in ("dense", "moe")} == kinds
    assert e.cache_bytes == cache


# --- 5. mixtures of experts


def test_all_experts_are_in_memory() -> None:
    e = ask("mistralai/Mixtral-8x7B-v0.1", gpu="28GB")
    # 32 layers of 8 experts of 3 · 4096 · 14336, of which a token passes two
    assert e.model.parameters - e.model.active_parameters == 32 * 6 * 3 * 4096 * 14336
    assert e.weights_bytes == 2 * 46_702_792_704
    assert e.fit is not None
    assert not e.fit.fits  # the active ones would: 12.88 B · 2 = 25.8 GB


def test_shared_experts_and_the_first_dense_layers() -> None:
    e = ask("deepseek-ai/DeepSeek-V2-Lite")
    assert e.model.layer_kinds == {"latent_attention": 27, "dense": 1, "moe": 26}
    # of 64 experts of 3 · 2048 · 1408 six are active, and the two that are shared always
    assert e.model.parameters == 15_706_484_224
    assert e.model.active_parameters == 15_706_484_224 - 26 * 58 * 3 * 2048 * 1408
    v3 = ask("deepseek-ai/DeepSeek-V3").model
    assert v3.layer_kinds == {"latent_attention": 61, "dense": 3, "moe": 58}
    assert v3.active_parameters == 671_026_404_352 - 58 * 248 * 3 * 7168 * 2048  # 37.6 B, as published


def test_fused_expert_tensors_are_counted() -> None:
    e = ask("openai/gpt-oss-20b", quant="none")
    # 24 layers of 32 experts: 2880 × 5760 and 2880 × 2880 with their biases; in all 20.9 B, as published
    experts = 24 * 32 * (2880 * 5760 + 5760 + 2880 * 2880 + 2880)
    assert e.model.parameters == 20_914_757_184
    assert e.model.active_parameters == 20_914_757_184 - experts // 32 * 28
    assert e.weights_bytes == 2 * 20_914_757_184


# --- 6. shared caches, towers, encoder-decoders, other names


def test_layers_that_read_anothers_cache_keep_none() -> None:
    e = ask("google/gemma-4-E2B-it")
    # of 35 layers the last 20 share: 15 keep one, every fifth of them full attention with heads of 512
    assert e.cache_bytes == 3 * kv(1, 512) * 8191 + 12 * (kv(1, 256) * 512 + 8)


def test_towers_are_counted_once_and_cache_nothing() -> None:
    e = ask("Qwen/Qwen2.5-VL-7B-Instruct")
    assert e.cache_bytes == 28 * kv(4, 128) * 8191
    text = 7_615_616_512  # Qwen2.5-7B
    # of the vision tower 32 layers: attention of 1280 with biases, gated 3420, two norms; patches; the merger
    layer = 3 * 1280 * 1280 + 3 * 1280 + 1280 * 1280 + 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    tower = 32 * layer + 1280 * 3 * 2 * 14 * 14 + 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    assert e.model.parameters == text + tower
    assert e.weights_bytes == 2 * e.model.parameters
    assert ask("google/gemma-3-27b-it").model.parameters == 27_432_406_640


def test_decoders_with_an_encoder_keep_a_cross_cache() -> None:
    # Whisper small: 12 layers keep their own 447 tokens and the keys and values of 1500 frames, in fp32
    assert ask("openai/whisper-small", 448).cache_bytes == 12 * kv(12, 64, FP32) * (1500 + 447)
    # T5 base: of 512 tokens 504 are the encoder's; the decoder starts from one of its own
    assert ask("google-t5/t5-base", 512).cache_bytes == 12 * kv(12, 64, FP32) * (504 + 8)


def test_gpt2_calls_its_sizes_by_other_names() -> None:
    e = ask("gpt2-xl", 1024)
    assert (e.model.layers, e.model.hidden_size, e.model.attention_heads, e.model.head_dim) == (48, 1600, 25, 64)
    assert e.cache_bytes == 48 * kv(25, 64, FP32) * 1023


def test_a_text_model_inside_another_configuration() -> None:
    e = ask("google/gemma-3-4b-it")
    assert (e.model.layers, e.model.hidden_size, e.model.parameters) == (34, 2560, 4_300_079_472)


# --- 7. quantization


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_the_cache_is_not_in_the_weights_bits(quant: str) -> None:
    assert ask("meta-llama/Llama-3.1-8B", quant=quant).cache_bytes == 32 * kv(8, 128) * 8191


def test_embeddings_norms_and_head_stay_and_scales_are_counted() -> None:
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (8_030_261_248 - linear)
    assert ask("meta-llama/Llama-3.1-8B", quant="nf4").weights_bytes == pytest.approx(
        rest + linear * 4.127 / 8, rel=1e-4
    )
    # one fp32 a row: 2 · 4096 + 2 · 1024 + 2 · 14336 + 4096 of a layer
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert ask("meta-llama/Llama-3.1-8B", quant="int8").weights_bytes == rest + linear + 4 * rows


def fact(model: str) -> dict[str, Any]:
    return next(f for f in map(json.loads, FACTS.read_text().splitlines()) if f["id"] == model)


def test_packed_words_are_no_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fact("TheBloke/Llama-2-13B-chat-GPTQ")["config"]))
    e = hfvram.estimate(str(tmp_path))
    assert e.model.parameters == 13_015_864_320  # Llama-2-13B's
    linear = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    # 4 bits, and for 128 of them a scale in fp16 and a zero point of 4 bits; the order of each layer's inputs
    order = 40 * (6 * 5120 + 13824) * 4
    assert e.weights_bytes == linear * (4 + 20 / 128) / 8 + order + 2 * (13_015_864_320 - linear)


def test_fp8_keeps_a_scale_a_block() -> None:
    # the catalogue's count of the headers: 669,065,609,216 in FP8, the rest in bf16; 4 bytes for 128 × 128
    exact = 669_065_609_216 * (1 + 4 / 128**2) + 2 * 1_960_795_136
    assert ask("deepseek-ai/DeepSeek-V3").weights_bytes == pytest.approx(exact, rel=1e-6)


def test_mxfp4_is_dequantized_without_its_kernels() -> None:
    e = ask("openai/gpt-oss-20b")
    assert e.weights_bytes == 2 * 20_914_757_184
    assert any("mxfp4" in warning for warning in e.warnings)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F8_E4M3"])
def test_new_dtypes_are_no_crash(dtype: str, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from hfvram.model.infer import infer

    shapes = {p.name: (dtype, p.shape) for p in infer(config).all_params if p.kind != "buffer"}
    file = safetensors(shapes)
    (tmp_path / "model.safetensors").write_bytes(file.head + bytes(file.size - len(file.head)))
    e = hfvram.estimate(str(tmp_path))
    assert (e.model.parameters, e.model.parameters_from) == (infer(config).parameters, "headers")


# --- 9. around PyTorch (8 is about training)


def test_reserved_memory_is_no_flat_share_and_the_context_none_at_all() -> None:
    some = [ask(m, c) for m in ("gpt2", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b") for c in (128, 1024, 8192)]
    shares = [e.peak_reserved_bytes / e.peak_allocated_bytes for e in some]
    assert max(shares) - min(shares) > 0.01
    assert all(e.peak_reserved_bytes % 2**21 == 0 for e in some)  # segments are multiples of 2 MiB
    assert len({e.device_bytes - e.peak_reserved_bytes for e in some}) == 1
