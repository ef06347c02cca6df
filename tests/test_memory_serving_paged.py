"""The pool of transformers' continuous batching: blocks by hand, and its size by transformers' own solver."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
from small import LLAMA

from hfvram.errors import HfvramError
from hfvram.memory.serving.options import Options
from hfvram.memory.serving.paged import SPARE, Layout, layout, plan, solve, terms
from hfvram.model.infer import infer
from hfvram.units import GiB

CONFIG = LLAMA | {"torch_dtype": "bfloat16"}
GEMMA = {
    **LLAMA,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 6,
    "sliding_window": 512,
    "head_dim": 64,
    "layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 2,
}


def test_blocks_of_256_tokens_in_groups_of_equal_size() -> None:
    assert layout(infer(CONFIG)) == Layout(full=1, sliding=0, layers=2, window=0, page=128)
    at = layout(infer(GEMMA))
    assert at == Layout(full=1, sliding=2, layers=2, window=512, page=128)
    # 1,000 tokens: four blocks, of each of the two sliding groups two
    assert (at.blocks(1000), at.blocks(256), at.blocks(1)) == (4 + 2 * 2, 3, 3)
    assert at.waste(1000) == 8 - (1000 + 2 * 512) / 256
    with pytest.raises(HfvramError, match="not gated_delta_net"):
        layout(infer(LLAMA | {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "head_dim": 64}))


def test_what_requests_take() -> None:
    made = plan(infer(CONFIG), Options(ctx=1000, dtype="bf16", quant="none", cache_element_bytes=2), ())
    block = 256 * 2 * 2 * 128 * 2  # keys and values of two layers, 128 numbers in bf16
    assert made.cache_bytes(((3, 1000), (1, 10))) == (3 * 4 + 1) * block
    assert made.waste_bytes(((3, 1000), (1, 10))) == (3 * 24 + 246) * block // 256
    assert made.bytes_a_token == block // 256
    assert made.tokens is None


def test_a_pool_fills_most_of_what_is_free() -> None:
    options: dict[str, Any] = {"ctx": 1000, "dtype": "bf16", "quant": "none", "cache_element_bytes": 2}
    made = plan(infer(CONFIG), Options(**options, gpu_bytes=8 * GiB), ())
    taken = (made.pool_bytes or 0) - SPARE * made.pools[0].unit_bytes + made.activation_bytes
    assert 0.79 < taken / (8 * GiB - made.loaded_bytes) <= 0.8
    few = plan(infer(CONFIG), Options(**options, gpu_bytes=8 * GiB, max_num_batched_tokens=512), ())
    assert (few.tokens or 0) > (made.tokens or 0)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
@pytest.mark.parametrize("values", [CONFIG, GEMMA])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize(("free", "batch"), [(4 * GiB, None), (GiB // 4, None), (4 * GiB, 1024)])
def test_transformers_own_solver(values: dict[str, Any], attention: str, free: int, batch: int | None) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.generation.continuous_batching import cache

    flash = attention == "flash_attention_2"
    config = AutoConfig.for_model(**values)
    config._attn_implementation = attention
    groups, types = cache.group_layers_by_attn_type(config)
    asked = {"block_size": 256, "max_blocks_per_request": None, "fallback_max_blocks_per_request": 32}
    asked |= {"return_logprobs": False, "use_async_batching": flash, "max_batch_tokens": batch, "num_blocks": None}
    solver = cache.PagedAttentionMemoryHandler

    class Free(solver):  # type: ignore[misc, valid-type]
        def get_available_memory(self) -> int:
            return free

    theirs = Free(config, SimpleNamespace(**asked), torch.bfloat16, types, len(groups[0]))
    a = infer(values)
    at = layout(a)
    masks = 0 if flash else 2 if at.sliding else 1
    assert solve(terms(a, at, 2, masks), free, batch) == theirs.infer_max_batch_tokens_and_num_blocks()
