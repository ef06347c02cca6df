"""The guide's rule, by hand, with its quirks kept."""

from hfvram.answer.guide import inference_items, rule


def test_transformer() -> None:
    # 7B at 4,096 tokens: 14 GB and 2·1·4096·32·128·32 = 1,073,741,824 elements of 2 bytes
    items = inference_items(7 * 10**9, batch=1, ctx=4096, layers=32, heads=32, head_dim=128)
    assert [i.bytes for i in items] == [14 * 10**9, 2 * 1_073_741_824]
    assert rule(items).bytes == 14 * 10**9 + 2 * 1_073_741_824
    assert rule(items).formula == "2P + 2·b·s·layers·d_head·n_head × 2 B"


def test_all_heads_are_cached_however_few_kv_heads_there_are() -> None:
    # Mixtral-8x7B keeps 8 KV heads: 1 GiB at 8,192 tokens; the guide says 32 heads, 4 GiB
    items = inference_items(46_702_792_704, batch=1, ctx=8192, layers=32, heads=32, head_dim=128)
    assert items[1].bytes == 4 * 2**30


def test_mamba_keeps_a_constant_state_whatever_the_context_and_batch() -> None:
    short = inference_items(130_000_000, batch=1, ctx=10, layers=24, d_state=16, d_inner=1536)
    long = inference_items(130_000_000, batch=8, ctx=10**6, layers=24, d_state=16, d_inner=1536)
    assert short[1].bytes == long[1].bytes == 24 * 16 * 1536 * 2
    assert rule(short).formula == "2P + layers·d_state·d_inner × 2 B"


def test_offloaded_experts_leave_the_active_parameters() -> None:
    items = inference_items(12_879_425_536, batch=1, ctx=1, layers=1, heads=1, head_dim=1, offloaded=True)
    assert items[0].bytes == 2 * 12_879_425_536
    assert rule(items).formula.startswith("2P_active + ")


def test_a_model_without_cache_is_its_weights() -> None:
    assert [i.name for i in inference_items(110_000_000, batch=1, ctx=512, layers=12)] == ["weights"]
