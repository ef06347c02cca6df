"""Autocast on meta: which dtypes come out, which casts are kept, in what order they are made."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from hfvram.memory.exact.run import Run  # noqa: E402

pytestmark = pytest.mark.slow


def meta(*shape: int, dtype: Any = torch.float32, **options: Any) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def run_in(autocast_dtype: Any, code: Any) -> Any:
    run = Run()
    with run.on_cuda(torch.nn.Module()), run.autocast.region(autocast_dtype):
        return code(run)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        (lambda x: F.linear(x, x), torch.bfloat16),
        (lambda x: x @ x, torch.bfloat16),
        (lambda x: F.softmax(x @ x, dim=-1), torch.float32),
        (lambda x: F.layer_norm((x @ x), (8,)), torch.float32),
        (lambda x: (x @ x).sum(), torch.float32),
        (lambda x: (x @ x) + 1, torch.bfloat16),
        (lambda x: F.gelu(x @ x), torch.bfloat16),
        (lambda x: (x @ x).pow(2), torch.float32),
        (lambda x: F.mse_loss(x @ x, x), torch.float32),
    ],
)
def test_dtypes_are_as_torchs_own_on_the_cpu_or_cudas_lists(code: Any, dtype: Any) -> None:
    assert run_in(torch.bfloat16, lambda run: code(meta(8, 8)).dtype) == dtype


def test_a_weight_is_cast_once_until_the_outermost_region_ends() -> None:
    weight, x = torch.nn.Parameter(meta(8, 8)), meta(4, 8)

    def code(run: Run) -> tuple[int, int]:
        with run.autocast.region(torch.bfloat16):
            F.linear(x, weight)
            F.linear(x, weight)
        return len(run.autocast.kept), sum(n == 8 * 8 * 2 for n in run.timeline.sizes)

    assert run_in(torch.bfloat16, code) == (1, 1)
    run = Run()
    with run.on_cuda(torch.nn.Module()), run.autocast.region(torch.bfloat16):
        F.linear(x, weight)
    assert not run.autocast.kept


def test_casts_are_made_from_the_last_argument_to_the_first() -> None:
    weight, bias = torch.nn.Parameter(meta(32, 8)), torch.nn.Parameter(meta(32))

    def code(run: Run) -> list[int]:
        F.linear(meta(4, 8), weight, bias)
        return [n for n in run.timeline.sizes if n in (4 * 8 * 2, 32 * 8 * 2, 32 * 2)]

    assert run_in(torch.bfloat16, code) == [32 * 2, 32 * 8 * 2, 4 * 8 * 2]


def test_cross_entropy_of_low_logits_keeps_a_low_and_a_wide_copy() -> None:
    """Log-softmax in bf16, then `nll_loss` in fp32: what an H100 held for BERT."""
    logits, labels = meta(16, 1000, dtype=torch.bfloat16, requires_grad=True), meta(16, dtype=torch.int64)

    def code(run: Run) -> list[int]:
        F.cross_entropy(logits, labels)
        return [n for n in run.timeline.sizes if n > 1000]

    assert run_in(torch.bfloat16, code) == [16 * 1000 * 2, 16 * 1000 * 4]


def test_torchs_own_autocast_on_meta_is_this_one() -> None:
    run = Run()
    with run.on_cuda(torch.nn.Module()), run.autocast.stands_in():
        with torch.autocast("meta", dtype=torch.float16):
            assert torch.is_autocast_enabled("meta")
            assert torch.get_autocast_dtype("meta") == torch.float16
            assert (meta(2, 2) @ meta(2, 2)).dtype == torch.float16
            with torch.autocast("cuda", enabled=False):
                assert (meta(2, 2) @ meta(2, 2)).dtype == torch.float32
        assert not torch.is_autocast_enabled("meta")
    assert torch.autocast is torch.amp.autocast_mode.autocast


def test_transformers_turns_it_off_on_meta_as_on_cuda() -> None:
    """Rotary angles are made so; `maybe_autocast` lets meta be."""
    generic = pytest.importorskip("transformers.utils.generic")
    run = Run()
    with run.on_cuda(torch.nn.Module()), run.autocast.stands_in(), run.autocast.region(torch.bfloat16):
        assert (meta(2, 2) @ meta(2, 2)).dtype == torch.bfloat16
        with generic.maybe_autocast(device_type="meta", enabled=False):
            assert (meta(2, 2) @ meta(2, 2)).dtype == torch.float32
    assert "meta" in generic.maybe_autocast.__code__.co_consts
