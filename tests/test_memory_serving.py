"""What serving engines plan, by hand and against what they printed (fixtures/published)."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hfvram.memory.serving import sglang, vllm
from hfvram.memory.serving.groups import beside_states, grouped
from hfvram.memory.serving.layers import state_cache
from hfvram.memory.serving.options import Options
from hfvram.memory.serving.specs import FullCache, LatentCache, StateCache, WindowCache
from hfvram.memory.serving.weights import PACKED, ROPE, parts, stages, standing
from hfvram.model import rope
from hfvram.model.architecture import Architecture
from hfvram.model.infer import infer
from hfvram.model.layers import LightningAttention, Mamba2, Param
from hfvram.read.catalogue import lookup
from hfvram.units import GiB, MiB

ROOT = Path(__file__).parents[1]


def architecture(name: str) -> Architecture:
    entry = lookup(name)
    assert entry is not None
    return infer(dict(entry.config))


def plan(name: str, **changes: object) -> tuple[int, int | None, int | None]:
    """Bytes a token, pool bytes and tokens of a model in the catalogue, by vLLM."""
    entry = lookup(name)
    assert entry is not None
    options = {"ctx": 8192, "dtype": "bf16", "quant": "none", "cache_element_bytes": 2, **changes}
    a = architecture(name)
    made = vllm.plan(a, Options(**options), rope.tables(a, entry.config))  # type: ignore[arg-type]
    return made.bytes_a_token, made.pool_bytes, made.tokens


def test_bytes_a_token_of_vllm_by_hand() -> None:
    # Llama-3.1-8B: 2 · 32 layers · 8 heads · 128 · 2 B; half of it on each of two ranks, and with a cache in fp8.
    assert plan("meta-llama/Llama-3.1-8B-Instruct")[0] == 131_072
    assert plan("meta-llama/Llama-3.1-8B-Instruct", tp=2)[0] == 65_536
    assert plan("meta-llama/Llama-3.1-8B-Instruct", cache_element_bytes=1)[0] == 65_536
    # 8 KV heads on 16 ranks: one each, not half a head.
    assert plan("meta-llama/Llama-3.1-8B-Instruct", tp=16)[0] == 16_384
    # Latent attention is the same on every rank: 27 layers · 576 · 2 B.
    assert plan("deepseek-ai/DeepSeek-V2-Lite-Chat")[0] == 31_104
    assert plan("deepseek-ai/DeepSeek-V2-Lite-Chat", tp=2)[0] == 31_104
    # Gemma-3-27B: 10 full and 52 sliding layers in 7 groups of 10: 70 slots · 2 · 16 heads · 128 · 2 B.
    assert plan("google/gemma-3-27b-it")[0] == 573_440


def test_a_pipeline_has_the_pool_of_its_smallest_stage() -> None:
    tall = plan("meta-llama/Llama-3.1-8B-Instruct", pp=4, gpu_bytes=int(79.19 * GiB), utilization=0.95)
    assert tall[0] == 131_072 // 4
    # Printed by vLLM 0.19 for this run: 68.89 GiB on the stage with the head, 2,257,264 tokens.
    assert tall[1] is not None
    assert tall[1] / GiB == pytest.approx(68.89, abs=0.02)
    assert tall[2] == pytest.approx(2_257_264, rel=0.001)


def test_unequal_kinds_of_full_attention_are_one_group() -> None:
    wide, narrow = FullCache(8, 128, 128, 2), FullCache(4, 128, 128, 2)
    groups = grouped([(0, wide), (1, narrow), (2, narrow)])
    assert len(groups.groups) == 1
    assert groups.row_bytes() == 65_536 + 2 * 32_768
    assert groups.row_bytes(1, 3) == 2 * 32_768


def test_smaller_pages_get_longer_blocks() -> None:
    full, window = FullCache(2, 512, 512, 2), WindowCache(2, 256, 256, 2, window=512)
    groups = grouped([(i, full if i % 6 == 5 else window) for i in range(12)])
    assert {g.cache.page_bytes for g in groups.groups} == {full.page_bytes}
    assert {g.cache.block for g in groups.groups} == {16, 32}
    assert groups.tokens(600) == 600 // 6 * 16


def test_nearly_as_many_layers_of_each_kind_are_padded_to_the_more_common() -> None:
    full, window = FullCache(8, 64, 64, 2), WindowCache(8, 64, 64, 2, window=128)
    groups = grouped([*((i, full) for i in range(13)), *((i, window) for i in range(13, 25))])
    assert [len(g.layers) for g in groups.groups] == [13, 12]
    assert groups.row_bytes() == 13 * full.page_bytes


def test_attention_beside_states_has_blocks_as_long_as_a_state() -> None:
    # A state of 1,000,000 B, attention of 1,024 B a token: 977 tokens, in blocks of a multiple of 16.
    token, state = beside_states(FullCache(2, 128, 128, 2), StateCache(0, 1_000_000, 4096))
    assert (token.block, state.page_bytes) == (992, 992 * 1024)
    latent, _ = beside_states(LatentCache(1152), StateCache(0, 1_000_000, 4096))
    assert latent.block == 896  # a multiple of 64


def test_states_on_ranks() -> None:
    mamba = Mamba2(hidden_size=64, heads=8, head_dim=16, d_state=32, groups=1, d_conv=4, chunk_size=256, params=())
    # Convolution: (128 + 2·1·32) · 3 columns; on two ranks a group each: (128 + 2·2·32)/2 · 3.
    assert state_cache(mamba, 1, 2, 4, 1) == StateCache(192 * 3 * 2, 8 * 16 * 32 * 4, 1)
    assert state_cache(mamba, 2, 2, 4, 1) == StateCache(128 * 3 * 2, 4 * 16 * 32 * 4, 1)


def test_a_recurrent_pool_of_sglang_as_printed() -> None:
    # MiniCPM-SALA printed 0.98 GB for 20 states: 20 + 1 slots · 24 layers · 32 heads · 128 · 128 · 4 B.
    one = state_cache(LightningAttention(hidden_size=4096, heads=32, head_dim=128, params=()), 1, 2, 4, 1)
    assert round(21 * 24 * one.own_bytes / GiB, 2) == 0.98


def test_sglang_shares_what_is_left_between_cache_and_states() -> None:
    a = architecture("Qwen/Qwen3-Next-80B-A3B-Instruct")
    o = Options(ctx=4096, dtype="bf16", quant="none", cache_element_bytes=2, gpu_bytes=int(276 * GiB))
    made = sglang.plan(a, o, ())
    tokens, states = made.pools
    assert made.room_bytes is not None
    assert states.pool_bytes / tokens.pool_bytes == pytest.approx(0.9, rel=0.005)
    spare = tokens.unit_bytes  # one page more than it has tokens
    assert -spare <= made.room_bytes - sum(p.pool_bytes for p in made.pools) < states.unit_bytes
    assert states.spare == tokens.spare == 1
    # 36 layers: (2·16·128 + 32·128)·3 columns in bf16, 32·128·128 in fp32.
    assert states.unit_bytes == 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    assert tokens.unit_bytes == 12 * 2 * 2 * 256 * 2


def test_vllm_weights_are_fused_padded_and_sharded() -> None:
    a = architecture("openai-community/gpt2")
    whole = sorted(n for n, _ in standing(a, "fp16", "none", 1, stages(12, 1)[0], ()).tensors)
    assert whole[-1] == -(-50257 // 64) * 64 * 768 * 2
    a = architecture("meta-llama/Llama-3.1-8B-Instruct")
    table = (rope.RopeTable(131_072, 128),)
    tensors = standing(a, "bf16", "none", 2, stages(32, 1)[0], table).tensors
    # On the first of two ranks: embedding, qkv (4096 + 2·1024)/2 rows, output, table, gate and up, down.
    assert [n for n, _ in tensors[:3]] == [128_256 // 2 * 4096 * 2, 3072 * 4096 * 2, 4096 // 2 * 4096 * 2]
    assert [n for n, tag in tensors if tag is ROPE] == [32 * MiB]
    assert (14_336 * 4096 * 2) in {n for n, _ in tensors}


def test_packed_words_and_scales_are_tensors_of_their_own() -> None:
    weight = Param("q_proj.weight", (256, 512), "linear")
    # 4 bits a weight; 1,024 groups: a scale of 2 B, a zero point of 4 bits; the order of 512 inputs.
    assert [n for n, _ in parts(weight, "fp16", "gptq-4")] == [65_536, 2_048, 512, 2_048]
    assert [n for n, _ in parts(weight, "fp16", "awq-4")] == [65_536, 2_048, 512]
    assert parts(weight, "bf16", "fp8")[0] == (131_072, PACKED)
    assert [n for n, _ in parts(Param("n", (512,), "norm"), "fp16", "gptq-4")] == [1_024]


def test_published_figures() -> None:
    spec = importlib.util.spec_from_file_location("published", ROOT / "scripts" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    sys.modules["published"] = published
    spec.loader.exec_module(published)
    scores, left_out = published.score(ROOT / "fixtures" / "published")
    assert published.holds(scores)
    assert left_out == {
        "no configuration": ["sgl-sala"],
        "nothing that follows from the settings": ["ggmlci-bge-kv"],  # encoders had a cache until March 2025
    }
    exact = {f: [s for s in scores if (s.engine, s.figure) == ("llama.cpp", f)] for f in ("cache", "state", "weights")}
    assert {f: (len(found), all(s.agrees is not False for s in found)) for f, found in exact.items()} == {
        "cache": (23, True),
        "state": (6, True),
        "weights": (2, True),
    }
    by_figure = {
        f: [s for s in scores if (s.engine, s.figure) == ("vllm", f)] for f in ("weights", "pool", "activations")
    }
    off = {s.id for s in by_figure["weights"] if not s.agrees}
    assert off == {"vllm-phi4gptq"}
    assert max(abs(s.error) for s in by_figure["pool"]) < 0.005
    assert max(abs(s.error) for s in by_figure["activations"]) < 0.02
    worse = [published.Score("x", "vllm", "pool", 100.0, 104.0, None)]
    assert not published.holds(worse)
    assert not published.holds([published.Score("x", "vllm", "cache", 1.0, 1.0, False)])
