"""Questions to serving engines, from the catalogue and small configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
from small import LLAMA

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.units import GiB

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
SESSION = Session()


def ask(model: str, **options: Any) -> Estimate:
    return SESSION.estimate(model, Request.from_dict({"engine": "vllm", **options}), offline=True)


def refusal(model: str = LLAMA_8B, **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        ask(model, **options)
    assert caught.value.kind == "usage"
    return caught.value.message


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("gpu", [None, "H100"])
@pytest.mark.parametrize(
    "model",
    [
        LLAMA_8B,
        "google/gemma-3-27b-it",
        "deepseek-ai/DeepSeek-V2-Lite",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "openai/gpt-oss-20b",
    ],
)
def test_items_add_up_and_the_pool_needs_a_gpu(engine: str, gpu: str | None, model: str) -> None:
    e = ask(model, engine=engine, gpu=gpu)
    assert sum(i.bytes for i in e.items) == e.peak_allocated_bytes
    assert e.serving is not None
    assert (e.serving.kv_pool_bytes is None) == (e.serving.kv_tokens is None) == (gpu is None)
    assert e.serving.kv_bytes_per_token > 0
    told = json.loads(json.dumps(e.to_dict()))
    assert {"kv_bytes_per_token", "kv_pool_bytes", "kv_tokens", "max_concurrency"} <= set(told["serving"])
    assert ask(model, **{k: v for k, v in told["request"].items() if v is not None}).to_dict() == told


def test_cache_bytes_are_the_requests_and_the_pool_is_the_engines() -> None:
    e = ask(LLAMA_8B, gpu="79.19GiB", gpu_memory_utilization=0.95, ctx=8192, batch=4)
    assert e.cache_bytes == 4 * 8192 * 131_072
    assert e.serving is not None
    assert e.serving.kv_pool_bytes is not None
    # Printed by vLLM 0.19: 58.11 GiB, 476,016 tokens, 58.11 requests.
    assert e.serving.kv_pool_bytes / GiB == pytest.approx(58.11, abs=0.02)
    assert e.serving.max_concurrency == pytest.approx(58.11, abs=0.02)
    assert e.fit is not None
    assert (e.fit.fits, e.fit.max_ctx, e.fit.max_batch) == (True, 118_992, 58)
    assert e.fit.headroom_bytes == e.serving.kv_pool_bytes - e.cache_bytes


def test_the_limits_are_exact() -> None:
    asked = {"gpu": "H100", "ctx": 8192}
    most = ask(LLAMA_8B, **asked).fit
    assert most is not None
    assert most.max_batch
    for batch, fits in ((most.max_batch, True), (most.max_batch + 1, False)):
        fit = ask(LLAMA_8B, **asked, batch=batch).fit
        assert fit is not None
        assert fit.fits is fits


def test_requests_of_different_lengths_take_whole_blocks() -> None:
    e = ask(LLAMA_8B, requests="2x17,1x16")
    assert e.cache_bytes == (2 * 32 + 16) * 131_072
    assert e.request.ctx == 17
    assert e.serving is not None
    assert e.serving.waste_bytes == 2 * 15 * 131_072
    sglang = ask(LLAMA_8B, engine="sglang", requests="2x17,1x16")
    assert sglang.cache_bytes == (2 * 17 + 16) * 131_072
    assert sglang.serving is not None
    assert sglang.serving.waste_bytes == 0
    assert "tokens" in refusal(requests="2x17", ctx=16)
    assert "count × tokens" in refusal(requests="2x-17")


def test_what_does_not_fit_has_ways_in_the_engines_own_flags() -> None:
    e = ask("Qwen/Qwen2.5-72B-Instruct", gpu="H100", tp=2, ctx=32768)
    assert e.fit is not None
    assert not e.fit.fits
    changes = [w.change for w in e.fit.ways]
    assert "--quantization fp8" in changes
    assert "--tensor-parallel-size 4" in changes
    assert not any("8" in c and "tensor" in c for c in changes)
    again = ask("Qwen/Qwen2.5-72B-Instruct", gpu="H100", tp=4, ctx=32768)
    assert again.fit is not None
    assert again.fit.fits
    taken = next(w.device_bytes for w in e.fit.ways if w.change == "--tensor-parallel-size 4")
    assert again.device_bytes == taken


def test_less_utilization_less_pool_and_eager_has_no_graphs() -> None:
    pools = [ask(LLAMA_8B, gpu="H100", gpu_memory_utilization=u).serving for u in (0.5, 0.9)]
    assert pools[0] is not None
    assert pools[1] is not None
    assert (pools[0].kv_tokens or 0) < (pools[1].kv_tokens or 0)
    eager = ask(LLAMA_8B, gpu="H100", enforce_eager=True).serving
    assert eager is not None
    assert eager.graph_bytes == 0 < pools[1].graph_bytes


def test_a_cache_in_fp8_asked_for_or_by_the_checkpoint(tmp_path: Path) -> None:
    config = LLAMA | {
        "quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    e = ask(str(tmp_path))
    assert e.request.kv_dtype == "fp8"
    assert e.serving is not None
    assert e.serving.kv_bytes_per_token == 2 * 2 * 2 * 64  # 2 layers, keys and values, 2 heads of 64, a byte each


def test_what_an_engine_has_no_use_for() -> None:
    assert "--cache static" in refusal(cache="static") or "--cache" in refusal(cache="static")
    assert "--mode train" in refusal(mode="train")
    assert "--phase prefill" in refusal(phase="prefill")
    assert "--method simulate" in refusal(method="simulate")
    assert "goes with --engine sglang" in refusal(mem_fraction_static=0.8)
    assert "goes with --engine vllm" in refusal(engine="transformers", max_num_seqs=4)
    assert "goes with --engine vllm" in refusal(engine="sglang", gpu_memory_utilization=0.8)
    assert "not divisible" in refusal(tp=2, gpus=3)
    assert "--tp 3 does not divide the 32 attention heads" in refusal(tp=3)
    assert "valid are auto, fp16, bf16, fp8" in refusal(kv_dtype="int4")
    assert "valid are auto, none, fp8" in refusal(quant="int8")
    assert "only decoders" in refusal("google-t5/t5-small")
    assert "--gpu-memory-utilization" in refusal(gpu_memory_utilization=1.5)
    for text in ("x", "3", "0x5", "2xmany", "2x16,"):
        assert "--requests" in refusal(requests=text)


def test_a_line_that_starts_an_engine() -> None:
    line = "CUDA_VISIBLE_DEVICES=0 vllm serve x/y --max-model-len 8k -tp 2 --kv-cache-dtype=fp8 --swap-space 4 --port 1"
    e = ask(LLAMA_8B, engine="transformers", engine_args=line)
    r = e.request
    assert (r.engine, r.ctx, r.tp, r.kv_dtype) == ("vllm", 8192, 2, "fp8")
    assert "not understood of --engine-args: --swap-space 4" in e.warnings
    assert ask(LLAMA_8B, engine="transformers", engine_args=line, ctx=100).request.ctx == 100
    sglang = "python -m sglang.launch_server --model-path x/y --tp-size 2 --mem-fraction-static 0.8"
    e = ask(LLAMA_8B, engine="transformers", engine_args=sglang)
    assert (e.request.engine, e.request.mem_fraction_static) == ("sglang", 0.8)
    assert "is understood" in refusal(engine_args="ls -l")
    assert "command line" in refusal(engine_args="vllm 'serve")
    assert "--engine sglang" in refusal(engine="sglang", engine_args=line)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_draft_adds_its_weights_and_its_cache(engine: str) -> None:
    small = "meta-llama/Llama-3.2-1B-Instruct"
    alone, draft = ask(LLAMA_8B, engine=engine).serving, ask(small, engine=engine).serving
    both = ask(LLAMA_8B, engine=engine, draft=small).serving
    assert alone is not None
    assert draft is not None
    assert both is not None
    # 16 layers of 8 heads of 64, twice, in bf16, beside the model's 131,072 B.
    assert both.kv_bytes_per_token == 131_072 + 16 * 2 * 8 * 64 * 2
    assert both.loaded_bytes - alone.loaded_bytes == pytest.approx(draft.loaded_bytes, rel=0.02)
    assert ask(LLAMA_8B, engine=engine, draft=small, ctx=16).cache_bytes == 16 * both.kv_bytes_per_token
    assert "recurrent" in refusal(engine=engine, draft="state-spaces/mamba-130m-hf")
    assert "goes with --engine" in refusal(engine="transformers", draft=small)


def test_recommended_is_what_the_engine_itself_fits() -> None:
    e = ask(LLAMA_8B, ctx=8192, recommend=True)
    assert e.recommended
    for r in e.recommended:
        fit = ask(LLAMA_8B, ctx=8192, gpu=r.gpu, gpus=r.gpus, tp=r.gpus).fit
        assert fit is not None
        assert fit.fits
    # 15 GiB of weights and 1 GiB of cache are within an RTX 4080's 16 GB, but not within 0.9 of it.
    assert all(r.gpus * r.capacity_bytes > 18 * GiB for r in e.recommended)


def test_a_batch_of_any_size_is_answered_at_once() -> None:
    e = ask(LLAMA_8B, gpu="H100", batch=10**9, ctx=16)
    assert e.cache_bytes == 10**9 * 16 * 131_072
    assert e.fit is not None
    assert not e.fit.fits


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_heads_of_the_model_itself_speculate(engine: str) -> None:
    alone, both = (ask("deepseek-ai/DeepSeek-V3", engine=engine, draft=d) for d in (None, "mtp"))
    assert alone.serving is not None
    assert both.serving is not None
    # a 62nd layer of latents, 576 in bf16 a token; 11.5 billion weights in fp8 but for a matrix of 2h × h
    assert both.serving.kv_bytes_per_token - alone.serving.kv_bytes_per_token == 576 * 2
    assert both.serving.loaded_bytes - alone.serving.loaded_bytes == pytest.approx(11.6e9, rel=0.02)
    assert "valid is the name of a draft model" in refusal(engine=engine, draft="mtp")
    hybrid = ask("Qwen/Qwen3-Next-80B-A3B-Instruct", engine=engine, draft="mtp")
    assert any("speculated token" in w for w in hybrid.warnings)


def test_experts_are_divided_by_data_parallel_ranks_too() -> None:
    one, eight = (ask("Qwen/Qwen3-30B-A3B", ep=n) for n in (1, 8))
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    assert one.weights_bytes - eight.weights_bytes == experts * 7 // 8
    assert eight.request.gpus == 8
    assert any("--enable-expert-parallel" in w for w in eight.warnings)
    assert one.cache_bytes == eight.cache_bytes
    assert "valid are 1 to 128" in refusal("Qwen/Qwen3-30B-A3B", ep=256)
    assert "has no experts" in refusal(ep=2)
    assert "valid is 1" in refusal("Qwen/Qwen3-30B-A3B", engine="sglang", ep=2)
