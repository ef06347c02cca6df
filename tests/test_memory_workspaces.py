"""Workspaces of matrix products, by what the model's own code multiplies."""

from typing import Any

import pytest

from hfvram.memory import formula
from hfvram.memory.workspaces import adds_bias
from hfvram.model.infer import infer
from hfvram.model.layers import Param, linear
from hfvram.request import Request

QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
LLAMA = QWEN2 | {"model_type": "llama"}
MAMBA = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}


def workspace(config: dict[str, Any], **asked: Any) -> dict[str, int]:
    request = Request(mode="inference", dtype="bf16", ctx=64, new_tokens=4, phase="generate", **asked)
    timeline = formula.timeline(infer(config), request)
    tags = zip(timeline.tags, timeline.sizes, strict=True)
    return {tag.name: nbytes for tag, nbytes in tags if tag.category == "workspace" and tag.name.startswith("cuBLAS")}


def test_a_bias_takes_another_workspace() -> None:
    """Qwen2's queries, keys and values have one, Llama's don't; Mamba multiplies by Δ's weight alone."""
    assert workspace(QWEN2) == {"cuBLAS workspace": 32 << 20, "cuBLASLt workspace": 1 << 20}
    assert workspace(LLAMA) == {"cuBLAS workspace": 32 << 20}
    assert workspace(MAMBA) == {"cuBLAS workspace": 32 << 20}


def test_in_8_bits_a_bias_is_added_after_the_product() -> None:
    assert "cuBLASLt workspace" not in workspace(QWEN2, quant="int8")
    assert "cuBLASLt workspace" in workspace(QWEN2, quant="nf4")


def test_a_bias_without_a_product_of_its_own_is_none() -> None:
    assert not adds_bias([*linear("q_proj", 8, 8), Param("bias", (8,), "bias"), Param("norm.bias", (8,), "bias")])
    assert adds_bias([Param("norm.weight", (8,), "norm"), *linear("o_proj", 8, 8, bias=True)])


@pytest.mark.slow
@pytest.mark.parametrize("config", [QWEN2, LLAMA, MAMBA], ids=lambda c: c["model_type"])
def test_as_the_models_own_code_has_it(config: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    request = Request(
        mode="inference", dtype="bf16", ctx=64, new_tokens=4, phase="generate", attention="sdpa", kernels="fused"
    )
    timeline = simulate(config, None, request)
    names = {tag.name for tag in timeline.tags if tag.name.startswith("cuBLAS")}
    assert names == set(workspace(config))
