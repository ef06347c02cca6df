"""Weights in a module's packed tensors, by their own names, dtypes and shapes: 256 outputs, 512 inputs."""

from math import prod

import pytest

from hfvram.model.packing import plain
from hfvram.model.unpacked import weights_of
from hfvram.read.checkpoint import StoredTensor

N = 256 * 512
Leaves = dict[str, tuple[str, tuple[int, ...]]]

CASES: list[tuple[str | None, Leaves, tuple[str, int | None] | None]] = [
    (None, {"weight": ("BF16", (256, 512))}, None),
    (None, {"weight": ("F8_E4M3", (256, 512)), "weight_scale": ("F32", ())}, None),
    (
        "gptq-4",
        {"qweight": ("I32", (64, 256)), "qzeros": ("I32", (4, 32)), "scales": ("F16", (4, 256))},
        ("qweight", N),
    ),
    # 8 bits in a checkpoint of 4 (GPTQModel's `dynamic`), and without any configuration
    (
        "gptq-4",
        {"qweight": ("I32", (128, 256)), "qzeros": ("I32", (4, 64)), "scales": ("F16", (4, 256))},
        ("qweight", N),
    ),
    (None, {"qweight": ("I32", (48, 256)), "qzeros": ("I32", (4, 24)), "scales": ("F16", (4, 256))}, ("qweight", N)),
    ("awq-4", {"qweight": ("I32", (512, 32)), "qzeros": ("I32", (4, 32)), "scales": ("F16", (4, 256))}, ("qweight", N)),
    ("gptq-2", {"qweight": ("I32", (32, 256))}, ("qweight", N)),
    ("int-4", {"weight_packed": ("I32", (256, 64)), "weight_scale": ("BF16", (256, 4))}, ("weight_packed", N)),
    ("nvfp4", {"weight_packed": ("U8", (256, 256)), "weight_scale": ("F8_E4M3", (256, 32))}, ("weight_packed", N)),
    ("nvfp4", {"weight": ("U8", (256, 256)), "weight_scale": ("F8_E4M3", (256, 32))}, ("weight", N)),
    # DeepSeek-V4: a method of 8 bits, and experts in MXFP4
    ("fp8", {"weight": ("I8", (256, 256)), "scale": ("F8_E8M0", (256, 16))}, ("weight", N)),
    ("int8", {"weight": ("I8", (256, 512)), "weight_scale": ("BF16", (256, 1))}, ("weight", N)),
    ("int8", {"weight": ("I8", (256, 512)), "SCB": ("F32", (256,))}, ("weight", N)),
    ("nf4", {"weight": ("U8", (N // 2, 1)), "weight.absmax": ("U8", (N // 64,))}, ("weight", N)),
    (
        "mlx-4",
        {"weight": ("U32", (256, 64)), "scales": ("BF16", (256, 8)), "biases": ("BF16", (256, 8))},
        ("weight", N),
    ),
    (
        "mlx-4",
        {"weight": ("U32", (256, 96)), "scales": ("BF16", (256, 8)), "biases": ("BF16", (256, 8))},
        ("weight", N),
    ),
    ("hqq-4", {"W_q": ("U8", (256, 256)), "scale": ("F16", (2048, 1)), "zero": ("F16", (2048, 1))}, ("W_q", N)),
    ("eetq-8", {"weight": ("I8", (512, 256)), "weight_scales": ("F16", (256,))}, ("weight", N)),
    ("bitnet-2", {"weight": ("U8", (64, 512)), "weight_scale": ("BF16", (1,))}, ("weight", N)),
    ("int-4", {"_weight_qdata": ("U8", (256, 256)), "_weight_scale": ("BF16", (256, 4))}, ("_weight_qdata", N)),
    ("aqlm-16", {"codes": ("I16", (256, 64, 1)), "codebooks": ("F16", (1, 65536, 1, 8))}, ("codes", None)),
    ("vptq", {"indices": ("I32", (1, 64, 60)), "centroids": ("F16", (1, 4096, 8))}, ("indices", None)),
    ("spqr", {"dense_weights": ("I64", (9000,))}, ("dense_weights", None)),
]


@pytest.mark.parametrize(("method", "table", "held"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_modules(method: str | None, table: Leaves, held: tuple[str, int | None] | None) -> None:
    leaves = {leaf: StoredTensor(leaf, dtype, shape, prod(shape)) for leaf, (dtype, shape) in table.items()}
    assert weights_of(leaves, plain(method) if method else None) == held
