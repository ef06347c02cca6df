"""Which attention kernel runs, and what it allocates."""

from typing import Any

import pytest

from hfvram.memory.timeline import Standing, Timeline

torch = pytest.importorskip("torch")

from hfvram.memory.exact.autocast import Autocast  # noqa: E402
from hfvram.memory.exact.kernels import CudaBehaviour, kernel_for, like_layout  # noqa: E402
from hfvram.memory.exact.tracker import Tracker  # noqa: E402
from hfvram.memory.generation import generation  # noqa: E402

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
SDPA = torch.nn.functional.scaled_dot_product_attention


def heads(number: int, size: int, dtype: Any = BF16, tokens: int = 48) -> Any:
    """(2, heads, tokens, size) that lies in memory as a projection leaves it: by token."""
    return torch.empty((2, tokens, number, size), dtype=dtype, device="meta").transpose(1, 2)


def allocated(work: Any) -> list[int]:
    """Bytes of what is allocated, but for scalars: seeds and offsets of the random numbers."""
    timeline = Timeline(Standing(()))
    with CudaBehaviour(Autocast()), Tracker(timeline):
        work()
    return [n for n in timeline.sizes if n > 8]


@pytest.mark.parametrize(
    ("q", "kv", "mask", "gqa", "kernel"),
    [
        ((8, 64), (8, 64), None, False, "cudnn"),
        ((8, 128), (2, 128), None, True, "cudnn"),
        ((8, 256), (8, 256), None, False, "flash"),
        ((8, 80, torch.float32), (8, 80, torch.float32), None, False, "efficient"),
        ((8, 64), (8, 64), "bool", False, "efficient"),
        ((8, 64, torch.float32), (2, 64, torch.float32), None, True, None),
        ((8, 64), (1, 64), None, False, None),
    ],
)
def test_choice(q: Any, kv: Any, mask: Any, gqa: bool, kernel: str | None) -> None:
    given = None if mask is None else torch.empty((2, 1, 48, 48), dtype=torch.bool, device="meta")
    assert kernel_for(heads(*q), heads(*kv), heads(*kv), given, gqa) == kernel


def test_a_bias_that_learns_leaves_the_math_path() -> None:
    bias = torch.empty((1, 8, 48, 48), dtype=BF16, device="meta", requires_grad=True)
    assert kernel_for(heads(8, 64), heads(8, 64), heads(8, 64), bias, False) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "gqa", "mask", "learns", "kernel"),
    [
        # sdp_utils.cpp, check_prefer_cudnn_attention: 9.0, 10.0 and 10.3 alone
        ("8.0", BF16, 64, True, False, False, "flash"),
        ("8.9", BF16, 128, True, False, False, "flash"),
        ("10.0", BF16, 128, True, False, False, "cudnn"),
        ("10.3", BF16, 128, True, False, False, "cudnn"),
        ("12.0", BF16, 128, True, False, False, "flash"),
        # check_flash_attention_hardware_support: from 8.0; the efficient kernel is not given grouped heads
        ("7.5", torch.float16, 64, True, False, False, None),
        ("7.5", torch.float16, 64, False, False, False, "efficient"),
        ("7.5", BF16, 64, False, False, False, None),  # less_than_sm80_mem_efficient_dtypes
        ("7.5", torch.float32, 64, False, True, False, "efficient"),
        # head sizes of more than 192 with gradients on 8.6, 8.9 and 12.x; (224, 256] is taken without dropout
        ("8.0", BF16, 200, False, False, True, "flash"),
        ("8.6", BF16, 200, False, False, True, "efficient"),
        ("8.9", BF16, 200, False, False, False, "flash"),
        ("8.9", BF16, 256, False, False, True, "flash"),
        ("12.0", BF16, 200, True, False, True, None),
        # minimum_gemm_alignment: 8 elements in half precision, 4 in fp32 from 8.0 on
        ("9.0", BF16, 20, False, True, False, None),
        ("9.0", torch.float32, 20, False, True, False, "efficient"),
        ("9.0", torch.float32, 18, False, True, False, None),
        ("7.5", torch.float32, 18, False, True, False, "efficient"),
    ],
)
def test_choice_by_generation(
    capability: str, dtype: Any, size: int, gqa: bool, mask: bool, learns: bool, kernel: str | None
) -> None:
    q, k = heads(8, size, dtype), heads(2 if gqa else 8, size, dtype)
    q.requires_grad_(learns)
    given = torch.empty((2, 1, 48, 48), dtype=torch.bool, device="meta") if mask else None
    assert kernel_for(q, k, k, given, gqa, generation(capability)) == kernel


def test_dropout_closes_the_widest_heads_to_flash_on_ada() -> None:
    q = heads(8, 256).requires_grad_()
    assert kernel_for(q, q, q, None, False, generation("8.9"), 0.1) == "efficient"
    with torch.no_grad():
        assert kernel_for(q, q, q, None, False, generation("8.9"), 0.1) == "flash"


def test_the_math_path_with_dropout_repeats_grouped_heads_and_masks_the_future() -> None:
    q, k = heads(8, 64, torch.float32), heads(2, 64, torch.float32)
    sizes = allocated(lambda: SDPA(q, k, k, dropout_p=0.1, is_causal=True, enable_gqa=True))
    repeated, scores = 2 * 8 * 48 * 64 * 4, 2 * 8 * 48 * 48 * 4
    assert sizes.count(repeated) >= 4  # queries scaled, keys and values of every head, keys scaled
    assert sizes.count(scores) >= 2
    assert {scores // 4, 48 * 48 * 4} < set(sizes)  # dropout's booleans, and the causal mask


def test_without_gradients_only_flash_computes_the_log_sum_exp() -> None:
    small, large = heads(8, 64), heads(8, 256)
    out = 2 * 48 * 8 * 64 * 2
    assert allocated(lambda: SDPA(small, small, small)) == [out]
    assert allocated(lambda: SDPA(large, large, large)) == [4 * out, 2 * 8 * 48 * 4]
    leaf = heads(8, 64).requires_grad_()
    assert allocated(lambda: SDPA(leaf, leaf, leaf)) == [out, 2 * 8 * 48 * 4]


def test_a_boolean_mask_becomes_a_bias_in_rows_of_eight() -> None:
    q, k = heads(8, 64), heads(8, 64, tokens=49)
    mask = torch.empty((2, 1, 48, 49), dtype=torch.bool, device="meta")
    assert allocated(lambda: SDPA(q, k, k, attn_mask=mask))[:2] == [2 * 48 * 49 * 2, 2 * 48 * 56 * 2]


def test_a_bias_whose_heads_lie_side_by_side_is_copied() -> None:
    """T5's: its rows are padded to the next multiple of 8, also where they are one; a contiguous one is taken as is."""
    q = heads(8, 64)
    contiguous = torch.empty((1, 8, 48, 48), dtype=BF16, device="meta")
    by_pair = torch.empty((1, 48, 48, 8), dtype=BF16, device="meta").permute(0, 3, 1, 2)
    assert allocated(lambda: SDPA(q, q, q, attn_mask=contiguous))[0] == 2 * 48 * 8 * 64 * 2
    assert allocated(lambda: SDPA(q, q, q, attn_mask=by_pair))[0] == 8 * 48 * 56 * 2


def test_the_output_lies_in_memory_as_the_queries_do() -> None:
    by_head = torch.empty((2, 8, 48, 64), dtype=BF16, device="meta")
    assert like_layout(by_head, by_head.shape).stride() == by_head.stride()
    by_token = heads(8, 64)
    assert like_layout(by_token, by_token.shape).stride() == by_token.stride()


def test_dropout_keeps_a_boolean_for_each_value() -> None:
    x = torch.empty((16, 64), dtype=BF16, device="meta")
    assert sorted(allocated(lambda: torch.nn.functional.dropout(x, 0.1))) == [16 * 64, 16 * 64 * 2]
    assert allocated(lambda: torch.nn.functional.dropout(x, 0.1, training=False)) == []
