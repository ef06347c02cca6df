"""Weights as they stand: by hand, and against what an H100 held once each model was built."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hfvram.memory.allocator import stand
from hfvram.memory.weights import (
    ADAPTER,
    BUFFERS,
    PACKED,
    QUANTIZED,
    SCALES,
    STORED,
    WEIGHTS,
    param_bytes,
    standing,
)
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.infer import infer
from hfvram.model.layers import Param

MEASURED = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
CASES = [case for case in map(json.loads, MEASURED.read_text().splitlines()) if case["request"]["mode"] == "inference"]


MISSING = {"falcon_h1": "its mup_vector (13,408 B a layer in bf16) is no buffer of the closed form"}


def built_cases() -> list[Any]:
    """The measured cases; those that are known to miss something marked so."""
    reasons = [MISSING.get(case["config"]["model_type"]) for case in CASES]
    marks = [[pytest.mark.xfail(strict=True, reason=reason)] if reason else [] for reason in reasons]
    return [pytest.param(case, id=case["id"], marks=m) for case, m in zip(CASES, marks, strict=True)]


@pytest.mark.parametrize("case", built_cases())
def test_what_stands_once_the_model_is_built(case: dict[str, Any]) -> None:
    """`torch.cuda.memory_allocated()` after the model was built: up to some rotary frequencies, block by block.

    A quantized model is built out of weights that are freed on the way: blocks that are not split are larger there.
    """
    request = case["request"]
    quant, double_quant = request.get("quant", "none"), request.get("double_quant", True)
    built = stand(standing(infer(case["config"]), request["dtype"], quant, double_quant)).allocated
    within = 2e-5 if quant == "none" else 3e-4
    assert built == pytest.approx(case["measured"]["built_allocated_bytes"], rel=within)


LINEAR = Param("x.weight", (4096, 1024))


def taken(param: Param, quant: str = "none", dtype: str = "bf16", double_quant: bool = True) -> dict[str, int]:
    out: dict[str, int] = {}
    for nbytes, tag in param_bytes(param, dtype, quant, double_quant):
        out[tag.name] = out.get(tag.name, 0) + nbytes
    return out


def test_plain_weights_are_elements_times_bytes() -> None:
    assert taken(LINEAR) == {WEIGHTS.name: 4096 * 1024 * 2}
    assert taken(LINEAR, dtype="fp32") == {WEIGHTS.name: 4096 * 1024 * 4}
    assert taken(Param("x", (7,), "norm"), dtype="fp16") == {WEIGHTS.name: 14}
    assert taken(Param("x", (64,), "buffer", "fp32")) == {BUFFERS.name: 256}
    assert taken(Param("x", (16, 8), "adapter", "fp32")) == {ADAPTER.name: 512}


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("bool", 1), ("int32", 4), ("int64", 8), ("complex64", 8), ("fp32", 4), (None, 2)]
)
def test_buffers_have_dtypes_of_their_own(dtype: str | None, nbytes: int) -> None:
    assert taken(Param("x", (10,), "buffer", dtype)) == {BUFFERS.name: 10 * nbytes}


def test_nf4_by_hand() -> None:
    # 4,194,304 weights: half a byte each; a scale of one byte for 64 of them, fp32 for 256 scales; the two tables
    # (16 and 256 entries in fp32) and the mean of the scales
    blocks = 4096 * 1024 // 64
    assert taken(LINEAR, "nf4") == {
        QUANTIZED.name: 2_097_152,
        SCALES.name: blocks + blocks // 256 * 4 + 256 * 4 + 4 + 16 * 4,
    }
    assert taken(LINEAR, "nf4", double_quant=False) == {QUANTIZED.name: 2_097_152, SCALES.name: blocks * 4 + 64}
    assert taken(LINEAR, "fp4") == taken(LINEAR, "nf4")
    # QLoRA, arXiv 2305.14314, section 3: 0.5 and 0.127 bits a weight beside the four
    assert taken(LINEAR, "nf4", double_quant=False)[SCALES.name] * 8 / (4096 * 1024) == pytest.approx(0.5, rel=1e-3)
    assert taken(LINEAR, "nf4")[SCALES.name] * 8 / (4096 * 1024) == pytest.approx(0.127, rel=0.02)


def test_nf4_of_sizes_that_do_not_divide() -> None:
    # 3 × 33 = 99 weights: 50 bytes; 2 blocks: 2 bytes, one fp32 of them
    assert taken(Param("x", (3, 33)), "nf4") == {QUANTIZED.name: 50, SCALES.name: 2 + 4 + 1024 + 4 + 64}


def test_int8_has_one_scale_a_row() -> None:
    assert taken(LINEAR, "int8") == {QUANTIZED.name: 4096 * 1024, SCALES.name: 4096 * 4}


@pytest.mark.parametrize("kind", ["embedding", "head", "norm", "bias", "conv", "other", "linear_subclass", "experts"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_bitsandbytes_replaces_linear_layers_alone(kind: Any, quant: str) -> None:
    assert taken(Param("x", (64, 64), kind), quant) == {WEIGHTS.name: 64 * 64 * 2}


def test_packed_weights() -> None:
    # 4 bits and 20 bits for 128 of them: 4.15625 / 8 · 4096 · 1024; the order of 1,024 inputs
    assert taken(LINEAR, "gptq-4") == {PACKED.name: 2_179_072 + 4_096}
    assert taken(LINEAR, "fp8") == {PACKED.name: 4096 * 1024 + 4096 * 1024 // 128**2 * 4}
    assert taken(Param("e", (8, 64, 32), "experts"), "fp8") == {PACKED.name: 8 * (64 * 32 + 4)}
    assert taken(Param("n", (64,), "linear"), "fp8") == {WEIGHTS.name: 128}
    assert taken(LINEAR, "mxfp4") == {PACKED.name: 4096 * 1024 * 17 // 32}


# --- what a checkpoint's quantization leaves alone


def model(*params: Param, **facts: Any) -> Architecture:
    stack = Stack(name="text", layers=(), before=params)
    return Architecture(
        model_type="x",
        class_name="X",
        task="causal",
        stacks=(stack,),
        main="text",
        vocab_size=8,
        hidden_size=8,
        max_positions=None,
        dtype="bf16",
        **facts,
    )


def test_modules_left_alone_stay_in_the_dtype() -> None:
    params = (Param("a.weight", (64, 64)), Param("b.weight", (64, 64)))
    a = model(*params, quantization="fp8", unquantized=("b",))
    assert [n for n, _ in standing(a, "bf16", "fp8", True).tensors] == [64 * 64, 4, 64 * 64 * 2]
    # somebody who quantizes the whole by another method doesn't ask what the checkpoint's own left alone
    assert sum(n for n, _ in standing(a, "bf16", "int8", True).tensors) == 2 * (64 * 64 + 64 * 4)


def test_stored_sizes_lead_where_the_headers_are_known() -> None:
    adapter = (Param("lora", (4, 8), "adapter", "fp32"),)
    a = model(Param("a.weight", (64, 64)), quantization="gptq-4", stored_sizes=(100, 20, 3), adapter=adapter)
    assert standing(a, "bf16", "gptq-4", True).bytes_by_tag == {STORED: 123, ADAPTER: 128}
    assert standing(a, "bf16", "none", True).bytes_by_tag == {WEIGHTS: 64 * 64 * 2, ADAPTER: 128}
    # what is turned into another dtype while it is loaded does not stand as it is stored
    b = model(Param("a.weight", (64, 64)), quantization="mxfp4", stored_sizes=(100, 20, 3))
    assert standing(b, "bf16", "mxfp4", True).bytes_by_tag == {WEIGHTS: 64 * 64 * 2}


def test_the_order_is_the_one_in_which_the_model_is_built() -> None:
    params = (Param("a", (3,), "norm"), Param("b", (5,), "buffer", "fp32"), Param("c", (7,), "norm"))
    assert [(n, tag.name) for n, tag in standing(model(*params), "bf16", "none", True).tensors] == [
        (6, WEIGHTS.name),
        (20, BUFFERS.name),
        (14, WEIGHTS.name),
    ]


def test_hundreds_of_patterns_are_quick() -> None:
    """As many as FP8 checkpoints of mixtures of experts list: every projection of the attention, router and head."""
    names = tuple(f"model.layers.{i}.self_attn.{n}_proj" for i in range(150) for n in "qkvo")
    a = model(*(Param(f"{name}.weight", (8, 8)) for name in names), quantization="fp8", unquantized=names)
    start = time.process_time()
    assert standing(a, "bf16", "fp8", True).bytes_by_tag == {WEIGHTS: 600 * 64 * 2}
    assert time.process_time() - start < 1
