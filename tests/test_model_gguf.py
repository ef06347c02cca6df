"""Metadata and tensors of GGUF files → architectures, family by family."""

from collections.abc import Mapping
from typing import Any

import pytest
from ggufs import LLAMA, Tensors, llama
from hypothesis import given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.memory.serving.llama_cache import Cells, caches
from hfvram.memory.serving.llama_compute import compute_bytes
from hfvram.model.architecture import Architecture
from hfvram.model.gguf import read
from hfvram.model.gguf_keys import Keys
from hfvram.model.gguf_rules import windows
from hfvram.model.layers import (
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Mamba1,
    Mamba2,
    MixtureOfExperts,
    ShortConv,
)
from hfvram.read.checkpoint import StoredTensor
from hfvram.units import MiB


def read_as(arch: str, keys: Mapping[str, Any], tensors: Tensors, **general: Any) -> Architecture:
    metadata = {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in keys.items()}
    metadata |= {f"general.{k}": v for k, v in general.items()}
    return read(metadata, tuple(StoredTensor(n, d, s, 0) for n, (d, s) in tensors.items()))


def blocks(layers: int, each: Mapping[str, tuple[int, ...]], hidden: int = 64, vocab: int = 96) -> Tensors:
    """Tensors of alike layers around an embedding."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": ("F16", (vocab, hidden))}
    for i in range(layers):
        found |= {f"blk.{i}.{n}": ("F16", s) for n, s in each.items()}
    return found | {"output_norm.weight": ("F32", (hidden,))}


def test_a_llama() -> None:
    tensors = {**llama(), "rope_freqs.weight": ("F32", (32,))}
    a = read_as("llama", LLAMA, tensors, file_type=15, basename="Small")
    assert (a.model_type, a.class_name, a.dtype, a.vocab_size, a.hidden_size) == ("llama", "Small", "Q4_K_M", 512, 256)
    assert (a.max_positions, a.task, a.tied_head, a.generates) == (8192, "causal", False, True)
    # embedding and output 2·512·256; a layer 256·256·2 + 2·128·256 + 3·512·256 + 2·256; the last norm 256
    assert a.parameters == 2 * 512 * 256 + 2 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 512 * 256 + 512) + 256
    assert a.layer_kinds == {"full_attention": 2, "dense": 2}
    first = a.attention
    assert first
    assert (first.heads, first.kv_heads, first.head_dim, first.value_dim) == (4, 2, 64, 64)


ATTENTION = {
    "attn_q.weight": (64, 64),
    "attn_k.weight": (32, 64),
    "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64),
}
FEED = {"ffn_up.weight": (128, 64), "ffn_gate.weight": (128, 64), "ffn_down.weight": (64, 128)}
SIZES = {"embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}


def test_a_mixture_of_experts() -> None:
    experts = {
        "ffn_gate_inp.weight": (8, 64), "ffn_up_exps.weight": (8, 32, 64), "ffn_gate_exps.weight": (8, 32, 64),
        "ffn_down_exps.weight": (8, 64, 32), "ffn_up_shexp.weight": (48, 64),
    }  # fmt: skip
    keys = {**SIZES, "block_count": 2, "expert_count": 8, "expert_used_count": 2}
    a = read_as("qwen3moe", keys, blocks(2, {**ATTENTION, **experts}))
    moe = a.moe
    assert isinstance(moe, MixtureOfExperts)
    assert (moe.experts, moe.top_k, moe.intermediate_size, moe.shared_intermediate_size) == (8, 2, 32, 48)
    assert a.parameters - a.active_parameters == 2 * 3 * 6 * 32 * 64
    assert a.tied_head


@pytest.mark.parametrize(
    ("arch", "keys", "layers", "full"),
    [
        ("gemma2", {"attention.sliding_window": 512}, 4, [1, 3]),
        ("gemma3", {"attention.sliding_window": 512}, 12, [5, 11]),
        ("gpt-oss", {"attention.sliding_window": 128}, 4, [1, 3]),
        ("laguna", {"attention.sliding_window": 512}, 8, [0, 4]),
        ("llama4", {}, 8, [3, 7]),
        ("gemma4", {"attention.sliding_window": 512, "attention.sliding_window_pattern": (True, True, False)}, 3, [2]),
        ("gemma3", {"attention.sliding_window": 512, "attention.sliding_window_pattern": 2}, 4, [1, 3]),
        ("llama", {"attention.sliding_window": 4096}, 3, [0, 1, 2]),
        ("phi3", {"attention.sliding_window": 2047}, 3, [0, 1, 2]),
        ("exaone4", {"attention.sliding_window": 4096}, 30, list(range(30))),
    ],
)
def test_windows_are_where_llama_cpp_has_them(arch: str, keys: dict[str, Any], layers: int, full: list[int]) -> None:
    found = windows(Keys({f"{arch}.{k}": v for k, v in keys.items()}, arch), layers)
    assert [i for i, w in enumerate(found) if w is None] == full


def test_gemma_4_has_wider_heads_in_full_layers_and_layers_that_share() -> None:
    keys = {
        **SIZES, "block_count": 6, "attention.key_length": 32, "attention.value_length": 32,
        "attention.key_length_swa": 16, "attention.value_length_swa": 16, "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [True, True, False] * 2, "attention.shared_kv_layers": 2,
    }  # fmt: skip
    a = read_as("gemma4", keys, blocks(6, {**ATTENTION, **FEED}))
    found = [(c.layer, c.kind, c.cell_bytes, c.cells) for c in caches(a, Cells(ctx=4096), "f16", "f16")]
    # 2 heads of 16 + 16 (window) or 32 + 32 (full) in fp16; the last two layers read others' caches
    assert found == [
        (0, "sliding window", 128, 1024), (1, "sliding window", 128, 1024), (2, "full attention", 256, 4096),
        (3, "sliding window", 128, 1024),
    ]  # fmt: skip


def test_latent_attention_new_and_old() -> None:
    latent = {
        "attn_q_a.weight": (24, 64), "attn_q_b.weight": (4 * 24, 24), "attn_kv_a_mqa.weight": (40, 64),
        "attn_k_b.weight": (4, 32, 16), "attn_v_b.weight": (4, 16, 32), "attn_output.weight": (64, 64),
    }  # fmt: skip
    keys = {
        "embedding_length": 64, "block_count": 1, "attention.head_count": 4, "attention.head_count_kv": 1,
        "attention.kv_lora_rank": 32, "attention.q_lora_rank": 24, "rope.dimension_count": 8,
        "attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
    }  # fmt: skip
    a = read_as("deepseek2", keys, blocks(1, {**latent, **FEED}))
    mixer = a.text.layers[0].mixers[0]
    assert isinstance(mixer, LatentAttention)
    assert (mixer.kv_lora_rank, mixer.qk_rope_head_dim, mixer.qk_nope_head_dim, mixer.v_head_dim) == (32, 8, 16, 16)
    assert [c.cell_bytes for c in caches(a, Cells(ctx=256), "f16", "f16")] == [(32 + 8) * 2]
    old = {k: v for k, v in latent.items() if not k.startswith(("attn_k_b", "attn_v_b"))}
    old["attn_kv_b.weight"] = (4 * 32, 32)
    keys |= {"attention.key_length": 24, "attention.value_length": 16}
    a = read_as("deepseek2", keys, blocks(1, {**old, **FEED}))
    # every head's key of 24 and value of 16
    assert [c.cell_bytes for c in caches(a, Cells(ctx=256), "f16", "f16")] == [4 * (24 + 16) * 2]


MAMBA = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4}


def test_state_spaces_and_hybrids() -> None:
    one = {"ssm_in.weight": (256, 64), "ssm_x.weight": (36, 128), "ssm_a": (128, 16), "ssm_out.weight": (64, 128)}
    a = read_as("mamba", {"embedding_length": 64, "block_count": 2, **MAMBA}, blocks(2, one))
    assert isinstance(a.text.layers[0].mixers[0], Mamba1)
    # (4 − 1)·128 columns and 128·16 of state, in fp32, for 3 sequences
    found = list(caches(a, Cells(ctx=256, sequences=3), "f16", "f16"))
    assert [(c.kind, c.cells, c.cell_bytes) for c in found] == [("recurrent states", 3, (3 * 128 + 128 * 16) * 4)] * 2
    two = {k: v for k, v in one.items() if k != "ssm_x.weight"} | {"ssm_norm.weight": (2, 64)}
    keys = {**SIZES, "block_count": 1, **MAMBA, "ssm.group_count": 2}
    a = read_as("falcon-h1", keys, blocks(1, {**two, **ATTENTION, **FEED}))
    assert [type(m) for m in a.text.layers[0].mixers] == [Attention, Mamba2]
    assert [c.kind for c in caches(a, Cells(ctx=256), "f16", "f16")] == ["full attention", "recurrent states"]
    conv = read_as(
        "lfm2",
        {**SIZES, "block_count": 1, "shortconv.l_cache": 3},
        blocks(1, {"shortconv.conv.weight": (64, 3), **FEED}),
    )
    assert isinstance(conv.text.layers[0].mixers[0], ShortConv)
    feed = read_as(
        "nemotron_h", {**SIZES, "block_count": 1}, blocks(1, {"ffn_up.weight": (128, 64), "ffn_down.weight": (64, 128)})
    )
    assert feed.text.layers[0].mixers == ()
    assert feed.layer_kinds == {"dense": 1}


def test_qwen_3_5_as_a_log_prints_its_states() -> None:
    """9B: 24 of 32 layers recurrent, 4 sequences: 201.00 MiB, R 9.00, S 192.00; 135,168 cells: 4,224 MiB."""
    delta = {
        "attn_qkv.weight": (8192, 64),
        "attn_gate.weight": (4096, 64),
        "ssm_beta.weight": (32, 64),
        "ssm_out.weight": (64, 4096),
    }
    keys = {
        "embedding_length": 64, "block_count": 33, "nextn_predict_layers": 1, "attention.head_count": 16,
        "attention.head_count_kv": 4, "attention.key_length": 256, "attention.value_length": 256, "ssm.conv_kernel": 4,
        "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 32,
    }  # fmt: skip
    tensors = dict(blocks(33, FEED))
    for i in range(33):
        tensors |= {f"blk.{i}.{n}": ("F16", s) for n, s in (ATTENTION if i % 4 == 3 else delta).items()}
    a = read_as("qwen35", keys, tensors)
    assert isinstance(a.text.layers[0].mixers[0], GatedDeltaNet)
    found = list(caches(a, Cells(ctx=135_168, sequences=4, unified=True), "f16", "f16"))
    assert sum(c.nbytes for c in found if c.kind == "recurrent states") / MiB == 201.0
    assert sum(c.nbytes for c in found if c.kind == "full attention") / MiB == 4224.0


def test_encoders_keep_nothing() -> None:
    keys = {**SIZES, "block_count": 2, "attention.causal": False}
    a = read_as("bert", keys, blocks(2, {**ATTENTION, **FEED}))
    assert (a.task, a.tied_head, list(caches(a, Cells(ctx=256), "f16", "f16"))) == ("encoder", False, [])


def test_a_family_that_is_new_is_read_by_its_tensors_and_said_so() -> None:
    a = read_as("brandnew", {**SIZES, "block_count": 2}, blocks(2, {**ATTENTION, **FEED}))
    assert a.layer_kinds == {"full_attention": 2, "dense": 2}
    assert "'brandnew' is not known" in a.warnings[0]


@pytest.mark.parametrize(
    ("arch", "keys", "layer", "kind", "words"),
    [
        ("rwkv7", {}, ATTENTION, "unknown_architecture", "'rwkv7' is not answered"),
        ("clip", {}, ATTENTION, "unknown_architecture", "projector"),
        ("flux", {"block_count": None}, ATTENTION, "unknown_architecture", "'flux' is not known"),
        ("brandnew", {}, {"time_mix.weight": (64, 64)}, "unknown_architecture", "'brandnew' is of no known kind"),
        ("llama", {"attention.head_count": 0}, ATTENTION, "", ""),
        ("llama", {"embedding_length": 0}, ATTENTION, "bad_header", "llama.embedding_length is 0"),
        ("llama", {"block_count": 10**9}, ATTENTION, "bad_header", "llama.block_count"),
        ("llama", {"block_count": "2"}, ATTENTION, "bad_header", "llama.block_count is '2'"),
        ("llama", {"block_count": 3}, ATTENTION, "unknown_architecture", "layer 2"),
    ],
)
def test_what_is_refused(
    arch: str, keys: dict[str, Any], layer: dict[str, tuple[int, ...]], kind: str, words: str
) -> None:
    def made() -> Architecture:
        return read_as(arch, {**SIZES, "block_count": 2, **keys}, blocks(2, layer))

    if not kind:
        assert made()
        return
    with pytest.raises(HfvramError) as caught:
        made()
    assert caught.value.kind == kind
    assert words in caught.value.message


KEYS = (
    *("block_count", "embedding_length", "context_length", "vocab_size", "nextn_predict_layers", "expert_count"),
    *("expert_used_count", "attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.sliding_window", "attention.sliding_window_pattern", "attention.shared_kv_layers", "ssm.conv_kernel"),
    *("ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count", "attention.causal"),
    *("attention.kv_lora_rank", "rope.dimension_count", "attention.value_length", "attention.key_length_swa"),
)
VALUES = st.one_of(
    st.integers(-3, 9), st.integers(-(2**63), 2**64), st.floats(), st.booleans(), st.text(max_size=4), st.none(),
    st.lists(st.one_of(st.integers(-2, 8), st.booleans()), max_size=4).map(tuple),
)  # fmt: skip
KINDS_OF_LAYERS = (
    ATTENTION, FEED, {"attn_kv_a_mqa.weight": (40, 64), "attn_k_b.weight": (4, 32, 16)}, {"ssm_in.weight": (256, 64)},
    {"ssm_in.weight": (256, 64), "ssm_x.weight": (36, 128)}, {"ssm_beta.weight": (32, 64)},
    {"shortconv.conv.weight": (64, 3)}, {"ffn_up_exps.weight": (8, 32, 64)}, {"ffn_down.weight": (64,)},
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(("llama", "gemma3", "gemma3n", "llama4", "deepseek2", "qwen35", "bert", "strange")),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=12),
    st.lists(st.sampled_from(KINDS_OF_LAYERS), min_size=1, max_size=3),
)
def test_strange_keys_are_refused_or_answered_and_nothing_else(
    arch: str, keys: dict[str, Any], layers: list[dict[str, tuple[int, ...]]]
) -> None:
    tensors = {f"blk.{i}.{n}": ("F16", s) for i in range(2) for each in layers for n, s in each.items()}
    try:
        a = read_as(arch, {**SIZES, "block_count": 2, **keys}, tensors)
        found = list(caches(a, Cells(ctx=512), "f16", "f16"))
    except HfvramError as error:
        assert error.kind in ("bad_header", "unknown_architecture")  # noqa: PT017
        return
    assert all(c.nbytes >= 0 for c in found)
    low, likely, high = compute_bytes(a, Cells(ctx=512))
    assert 0 <= low <= likely <= high
