"""What a request leaves open, and what contradicts the model."""

from typing import Any

import pytest
import small

from hfvram.answer.resolve import resolve
from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.infer import infer
from hfvram.request import Request

LLAMA = small.LLAMA | {"max_position_embeddings": 2048, "torch_dtype": "bfloat16"}
BERT = {**LLAMA, "model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512}
MPT = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 100}


def model(config: dict[str, Any] = LLAMA, **changes: Any) -> Architecture:
    return infer({**config, **changes})


def resolved(architecture: Architecture, **options: Any) -> Request:
    return resolve(architecture, Request(**options))[0]


def refusal(architecture: Architecture, **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        resolve(architecture, Request(**options))
    assert caught.value.kind == "usage"
    return caught.value.message


@pytest.mark.parametrize(("limit", "ctx"), [(2048, 2048), (4096, 4096), (131_072, 4096), (None, 4096), (512, 512)])
def test_context_is_4096_or_the_models_limit(limit: int | None, ctx: int) -> None:
    config = {k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}
    a = infer({**config, "max_position_embeddings": limit or -1})
    assert resolved(a).ctx == ctx


@pytest.mark.parametrize(("ctx", "new"), [(4096, 8), (9, 8), (8, 7), (2, 1), (1, None)])
def test_new_tokens_are_8_or_what_leaves_a_prompt(ctx: int, new: int | None) -> None:
    assert resolved(model(), ctx=ctx).new_tokens == new


def test_a_generator_without_a_prompt_is_refused() -> None:
    assert "valid are 1 to 99" in refusal(model(), ctx=100, new_tokens=100)
    assert "valid are 1 to 2047" in refusal(model(), new_tokens=3000)


def test_a_generator_without_a_prompt_at_one_token() -> None:
    refusal(model(), ctx=1, new_tokens=1)


def test_over_the_limit_is_a_warning() -> None:
    request, notes = resolve(model(), Request(ctx=2049))
    assert request.ctx == 2049
    assert notes == ["ctx 2,049 is over the model's limit of 2,048 tokens"]
    assert resolve(model(), Request(ctx=2048))[1] == []


def test_phase_by_task() -> None:
    assert resolved(model()).phase == "generate"
    assert resolved(model(BERT)).phase == "encode"
    assert resolved(model(BERT)).new_tokens is None
    assert resolved(model(), phase="prefill").new_tokens is None
    assert "keeps no cache, valid is encode" in refusal(model(BERT), phase="generate")
    assert "keeps no cache, valid is encode" in refusal(model(BERT), phase="prefill")
    assert "--phase generate" in refusal(model(), phase="encode", cache="static")


def test_dtype_is_the_checkpoints() -> None:
    assert resolved(model()).dtype == "bf16"
    assert resolved(model(), dtype="fp32").dtype == "fp32"
    assert resolved(model()).kv_dtype == "bf16"
    assert resolved(model(torch_dtype="float16"), kv_dtype="fp16").kv_dtype == "fp16"
    assert "the computing dtype, here bf16" in refusal(model(), kv_dtype="fp8")


def test_a_checkpoints_own_quantization() -> None:
    a = model(quantization_config={"quant_method": "gptq", "bits": 4})
    request, notes = resolve(a, Request())
    assert request.quant == "gptq-4"
    assert "the checkpoint is gptq-4" in notes[0]
    assert resolve(a, Request(quant="none"))[1] == []
    assert "gptq-4 already" in refusal(a, quant="nf4")
    assert "valid are auto and none" in refusal(a, quant="awq-4")
    unheard = model(quantization_config={"quant_method": "spqr"})
    assert "quantization spqr is not supported yet" in refusal(unheard)
    assert resolved(unheard, quant="none").quant == "none"


def test_attention_that_the_model_can_not_run() -> None:
    assert resolved(model(), attention="eager").attention == "eager"
    request, notes = resolve(model(MPT), Request(attention="sdpa"))
    assert request.attention == "eager"  # MPT's code has no other
    assert "can't run --attention sdpa: eager runs instead" in notes[0]


def test_nothing_is_left_open_and_resolving_again_changes_nothing() -> None:
    for a in (model(), model(BERT), model(MPT)):
        once = resolved(a)
        assert None not in (once.ctx, once.phase, once.gpus)
        assert "auto" not in (once.dtype, once.method)
        options = Request.from_dict(once.to_dict())
        assert options == once
        assert resolve(a, once)[0] == once


def test_the_generation_is_hoppers_unless_named_and_another_is_told() -> None:
    assert resolved(model()).compute_capability is None
    assert resolved(model(), compute_capability="9.0") == resolved(model())
    request, warnings = resolve(model(), Request(compute_capability="8.9"))
    assert request.compute_capability == "8.9"
    assert warnings == ["attention kernels for Ada (8.9) as PyTorch's source chooses them, not measured"]
    assert "--dtype fp16" in resolve(model(), Request(compute_capability="7.5"))[1][0]
    assert "--dtype" not in resolve(model(), Request(compute_capability="7.5", dtype="fp16"))[1][0]
    assert resolve(model(), Request(compute_capability="8.9", attention="eager"))[1] == []


def test_expandable_segments_are_told_not_to_be_measured() -> None:
    assert "not measured" in resolve(model(), Request(expandable_segments=True))[1][0]


@pytest.mark.parametrize("cache", ["offloaded", "quantized"])
def test_caches_that_generate_alone_makes(cache: str) -> None:
    assert refusal(model(), cache=cache, phase="prefill") == f"--cache {cache} goes with --phase generate"
    assert resolved(model(), cache=cache).cache == cache


def test_what_an_answer_leaves_out_is_said() -> None:
    """Towers that text does not pass, experts that bitsandbytes leaves alone, parameters that accelerate makes fp32."""
    mixture = {"model_type": "mixtral", "num_hidden_layers": 2}
    picture = {"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 2}}
    dense = {"model_type": "llama", "num_hidden_layers": 2, "dtype": "bfloat16"}

    def said(config: dict[str, Any], **options: Any) -> str:
        return " ".join(resolve(infer(config), Request.from_dict({"ctx": 64} | options))[1])

    assert "text alone is trained on" in said(picture, mode="train")
    assert "the prompt is text alone" in said(picture)
    assert "experts that are one tensor stay in" in said(mixture, quant="nf4")
    assert "which QLoRA casts to fp32" in said(mixture, mode="qlora")
    net = {"model_type": "qwen3_5_text", "num_hidden_layers": 2}
    assert "without flash-linear-attention" in said(net, mode="train")
    assert "flash-linear-attention" not in said(net) + said(net, mode="train", kernels="fallback")
    sharded = {"mode": "train", "fsdp": "full_shard", "gpus": 8, "mixed_precision": "bf16", "method": "simulate"}
    assert "accelerate makes them fp32" in said(dense, **sharded)
    assert "accelerate" not in said(dense, **sharded, dtype="fp32")


def test_qlora_of_a_quantized_checkpoint_is_refused() -> None:
    fp8 = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(HfvramError, match="fp8 already") as caught:
        resolve(infer(fp8), Request(mode="qlora", ctx=64))
    assert caught.value.kind == "usage"
