"""The GPU's generation in both engines: which kernels run, and cuBLAS's workspace."""

from typing import Any

import pytest

from hfvram.memory.allocator import replay
from hfvram.memory.formula import timeline
from hfvram.memory.generation import GENERATIONS, generation
from hfvram.model.infer import infer
from hfvram.request import Request

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def request(capability: str, **options: Any) -> Request:
    options = {"dtype": "bf16", "batch": 2, **options}
    return Request(ctx=1032, new_tokens=8, phase="generate", quant="none", compute_capability=capability, **options)


def allocated(capability: str, **options: Any) -> int:
    return replay(timeline(infer(LLAMA), request(capability, **options))).allocated_bytes


def test_workspaces() -> None:
    """`parseChosenWorkspaceSize`: :4096:2:16:8 in KiB, or 32 MiB."""
    assert generation("8.9").cublas_bytes == 4096 * 1024 * 2 + 16 * 1024 * 8 == 8_519_680
    assert {c for c, g in GENERATIONS.items() if g.cublas_bytes == 4096 * 8 * 1024} == {
        *("9.0", "10.0", "10.3", "12.0", "12.1")
    }


def test_an_ampere_saves_the_larger_workspace() -> None:
    hopper, ampere = (timeline(infer(LLAMA), request(c)).fullest_bytes() for c in ("9.0", "8.0"))
    assert hopper - ampere == (32 << 20) - 8_519_680


def test_before_ampere_grouped_heads_stand_as_scores() -> None:
    """Two squares of fp32 for 2 sequences, 8 heads and 1,024 tokens: fp16 before Ampere, where no kernel takes them."""
    squares = 2 * 2 * 8 * 1024 * 1024 * 4
    assert allocated("7.5", dtype="fp16") - allocated("8.0", dtype="fp16") > 0.9 * squares
    assert allocated("7.5", dtype="fp16", padding=True) == allocated("8.0", dtype="fp16", padding=True)
    assert allocated("7.5", padding=True) - allocated("8.0", padding=True) > 0.9 * squares


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("capability", ["7.5", "8.6", "10.0"])
def test_both_engines_agree(capability: str, padding: bool, dtype: str, kv_heads: int) -> None:
    pytest.importorskip("transformers")
    from hfvram.memory.exact.simulate import simulate

    config = {**LLAMA, "num_key_value_heads": kv_heads}
    asked = request(capability, padding=padding, dtype=dtype)
    formula = replay(timeline(infer(config), asked)).allocated_bytes
    assert formula == pytest.approx(replay(simulate(config, "LlamaForCausalLM", asked)).allocated_bytes, rel=1e-2)
