"""DeepSeek-V4's caches and scores, by hand arithmetic."""

import pytest

from hfvram.memory.compressed import cache_sizes, compressed_attention
from hfvram.memory.forward import Forward
from hfvram.memory.streams import collapse
from hfvram.memory.timeline import Standing, Timeline
from hfvram.model.layers import CompressedAttention


def attention(kind: str, rate: int, index_heads: int = 0) -> CompressedAttention:
    return CompressedAttention(
        kind=kind,  # type: ignore[arg-type]
        hidden_size=64,
        heads=4,
        head_dim=32,
        rotary_dim=8,
        q_lora_rank=16,
        output_groups=2,
        output_lora_rank=8,
        window=128,
        rate=rate,
        index_heads=index_heads,
        index_head_dim=16 if index_heads else 0,
        index_top_k=8 if index_heads else 0,
        params=(),
    )


SLIDING = attention("sliding_attention", 0)
HEAVY = attention("heavily_compressed_attention", 128)
SPARSE = attention("compressed_sparse_attention", 4, index_heads=2)


def test_a_window_keeps_keys_and_values_apart() -> None:
    # 127 old tokens and the new one, 32 wide, bf16, 2 sequences; a counter.
    assert cache_sizes(SLIDING, Forward(batch=2, tokens=1, past=1000)) == [2 * 128 * 32 * 2, 8, 2 * 128 * 32 * 2]


def test_heavy_compression_keeps_one_entry_for_128_tokens() -> None:
    # 1001 tokens: 7 entries, and 1001 − 896 = 105 tokens that wait, values and gates.
    sizes = cache_sizes(HEAVY, Forward(batch=2, tokens=1, past=1000))
    assert sizes == [2 * 128 * 64, 8, 2 * 105 * 64, 2 * 105 * 64, 2 * 7 * 64]


def test_a_prefill_keeps_all_that_it_projected() -> None:
    # Slices of the projections are kept: their storage is the whole prompt's.
    sizes = cache_sizes(HEAVY, Forward(batch=1, tokens=1000))
    assert sizes[2:] == [1000 * 64, 1000 * 64, 7 * 64]


def test_sparse_compression_overlaps_and_has_an_indexer() -> None:
    # Two series of 32 (16 for the indexer) a token, entries of 4, and the last window's 4 tokens of one series.
    sizes = cache_sizes(SPARSE, Forward(batch=1, tokens=1, past=999))
    compressor = [4 * 2 * 64, 4 * 2 * 64, 250 * 64, 4 * 64, 4 * 64]
    indexer = [4 * 2 * 32, 4 * 2 * 32, 250 * 32, 4 * 32, 4 * 32]
    assert sizes[2:] == compressor + indexer


@pytest.mark.parametrize("part", [SLIDING, HEAVY, SPARSE])
def test_only_cache_output_and_weights_are_left(part: CompressedAttention) -> None:
    t = Timeline(Standing(()))
    f = Forward(batch=1, tokens=256)
    cache: list[int] = []
    out, weights = compressed_attention(t, f, part, cache)
    assert set(t.live(len(t.events))) == {out, *weights, *cache}
    entries = 256 // part.rate if part.rate else 0
    assert [t.sizes[w] for w in weights] == [4 * 256 * (256 + entries) * 2]


def test_streams_are_collapsed_in_fp32() -> None:
    # 3 streams of 64, 10 tokens: at most two fp32 copies of all of them, beside their weighted sum.
    t = Timeline(Standing(()))
    out = collapse(t, Forward(batch=1, tokens=10), 64, 3)
    assert t.live(len(t.events)) == [out]
    assert t.sizes[out] == 10 * 64 * 2
    assert max(t.sizes) == 10 * 64 * 3 * 4
