"""What a matrix of 256 outputs and 512 inputs (n = 131,072) becomes, by hand."""

from dataclasses import replace

import pytest

from hfvram.model.layers import Param, ParamKind
from hfvram.model.packing import Scheme, by_method, is_known, matrix_bytes, packed_bytes, plain

N = 256 * 512
CASES: list[tuple[Scheme, tuple[int, ...]]] = [
    # words of 32 bits; a scale of 2 B and a zero point of b bits for 128 weights: 1,024 of them; 4 B an input
    (plain("gptq-4"), (N // 2, 2_048, 512, 2_048)),
    (plain("gptq-8"), (N, 2_048, 1_024, 2_048)),
    (plain("gptq-3"), (N * 3 // 8, 2_048, 384, 2_048)),
    (replace(plain("gptq-4"), group=0, ordered=False), (N // 2, 512, 128)),  # a scale a row
    (plain("awq-4"), (N // 2, 2_048, 512)),
    (replace(plain("awq-4"), group=64), (N // 2, 4_096, 1_024)),
    (replace(plain("int-4"), group=32, zeros=False), (N // 2, 4_096 * 2)),
    # zero points of compressed-tensors in words of 32 bits along the outputs: 256·4/32 words for each of 4 groups
    (plain("int-4"), (N // 2, 2_048, 4 * 32 * 4)),
    (replace(plain("int-4"), loader="torchao"), (N // 2, 1_024 * 4)),
    (replace(plain("int8"), loader="compressed-tensors"), (N, 512)),
    (plain("fp8"), (N, 2 * 4 * 4)),  # 2 × 4 blocks of 128 × 128
    (replace(plain("fp8"), block=None), (N, 4)),
    (replace(plain("fp8"), block=None, static=True), (N, 4, 4)),
    (replace(plain("fp8"), block=None, by_row=True), (N, 512)),
    (replace(plain("fp8"), block=None, by_row=True, scale_bytes=4), (N, 1_024)),
    (plain("nvfp4"), (N // 2, N // 16, 4, 4)),
    (plain("mxfp4"), (N // 2, N // 32)),
    (plain("mxfp8"), (N, N // 32)),
    (plain("hqq-4"), (N // 2, N // 64 * 2, N // 64 * 2)),
    (plain("mlx-4"), (N // 2, N // 64 * 2, N // 64 * 2)),
    (plain("quanto-8"), (N, 512)),
    (plain("quanto-4"), (N // 2, 2_048, 2_048)),
    (plain("eetq-8"), (N, 512)),
    (plain("bitnet-2"), (N // 4, 2)),
    # one book of 2^16 vectors of 8 in fp16, a code of 2 B for 8 weights, a scale for each output
    (replace(plain("aqlm-16"), codebook=(1, 16, 8, 1)), (N // 8 * 2, 65_536 * 8 * 2, 512)),
]


@pytest.mark.parametrize(("scheme", "sizes"), CASES, ids=lambda x: x.method if isinstance(x, Scheme) else "")
def test_a_matrix(scheme: Scheme, sizes: tuple[int, ...]) -> None:
    assert matrix_bytes(scheme, 256, 512) == sizes


def test_rows_that_do_not_fill_words_or_groups() -> None:
    # 100 inputs of 4 bits: 13 words a row, and one group
    assert matrix_bytes(plain("awq-4"), 2, 100) == (2 * 13 * 4, 4, 1)
    assert matrix_bytes(plain("fp8"), 129, 1) == (129, 2 * 4)


@pytest.mark.parametrize("method", ["spqr", "vptq", "gptq", "aqlm-16", "fp6", "none"])
def test_what_has_no_size(method: str) -> None:
    assert matrix_bytes(plain(method), 256, 512) is None
    assert not is_known(plain(method)) or method == "none"


def test_what_is_a_matrix() -> None:
    def sizes(name: str, shape: tuple[int, ...], kind: ParamKind, method: str = "awq-4") -> object:
        return packed_bytes(plain(method), Param(name, shape, kind))

    assert sizes("q_proj.weight", (256, 512), "linear") == (N // 2, 2_048, 512)
    assert sizes("experts.down_proj", (8, 256, 512), "experts") == (8 * N // 2, 8 * 2_048, 8 * 512)
    assert sizes("q_proj.bias", (256,), "bias") is None
    assert sizes("norm.weight", (256,), "norm") is None
    assert sizes("mlp.gate.weight", (8, 256), "linear_subclass") is None  # a router
    assert sizes("experts.down_proj_bias", (8, 256), "experts") is None
    assert sizes("lm_head.weight", (1000, 256), "head") is None
    assert sizes("embed.weight", (256, 512), "embedding", "mlx-4") == (N // 2, 4_096, 4_096)  # MLX packs it, too


def test_modules_of_another_method() -> None:
    s = Scheme("nvfp4", experts=None, alone=True, exceptions=((("self_attn",), "fp8"), (("lm_head", "mlp"), "nvfp4")))
    assert [s.of(f"layers.0.{m}.weight") for m in ("self_attn.q_proj", "mlp.up_proj", "other")] == [
        "fp8",
        "nvfp4",
        "none",
    ]
    assert s.of("lm_head.weight", "head") == "nvfp4"
    assert s.of("embed.weight", "embedding") == "none"
    assert by_method(s, "fp8").method == "fp8"
    mixed = Scheme("fp8", experts="mxfp4")
    assert (mixed.of("e", "experts"), mixed.of("q")) == ("mxfp4", "fp8")
    assert is_known(s)
    assert not is_known(replace(s, experts="fp6"))
