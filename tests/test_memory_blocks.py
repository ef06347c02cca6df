"""The small pieces: what each allocates, keeps and frees, by hand, and that nothing is freed twice."""

from typing import Any

import pytest

from hfvram.memory.allocator import replay
from hfvram.memory.blocks import activate, normalize, project, rotate
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Standing, Tag, Timeline

OUT = Tag("out", "activations")
K = 1024  # every size a multiple of 512, so that bytes are what the allocator counts


def written(*, b: int = 1, s: int = 512, **facts: Any) -> tuple[Timeline, Forward]:
    return Timeline(Standing(())), Forward(batch=b, tokens=s, **facts)


def after(t: Timeline, out: int) -> tuple[int, int]:
    """The fullest moment, and what is still live: the output alone."""
    assert t.live(len(t.events)) == [out]
    assert len(set(t.events)) == len(t.events)
    return replay(t).allocated_bytes, t.sizes[out]


def test_forward_counts_rows_and_bytes() -> None:
    f = Forward(batch=3, tokens=5, dtype="bf16")
    assert (f.rows, f.bytes(7), f.fp32_bytes(7), f.element_bytes, f.half) == (15, 210, 420, 2, True)
    assert Forward(batch=1, tokens=1, dtype="fp32").half is False


@pytest.mark.parametrize(
    ("kind", "dtype", "peak", "out"),
    [
        # x, its square or the scaled copy in fp32: 4 + 4; then scaled, the cast and the output: 4 + 2 + 2
        ("rms", "bf16", 8, 2),
        ("rms", "fp16", 8, 2),
        ("rms", "fp32", 8, 4),  # the square alone, then scaled and output
        ("layer", "bf16", 2, 2),
        ("layer", "fp32", 4, 4),
    ],
)
def test_normalization(kind: Any, dtype: str, peak: int, out: int) -> None:
    t, f = written(dtype=dtype)
    assert after(t, normalize(t, f, K, kind)) == (peak * 512 * K, out * 512 * K)


def test_a_linear_layer_is_its_output() -> None:
    t, f = written()
    assert after(t, project(t, f, K, 3 * K, OUT)) == (2 * 512 * 3 * K, 2 * 512 * 3 * K)


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_four_bits_are_dequantized_for_the_product(quant: str) -> None:
    t, f = written(quant=quant)
    peak, out = after(t, project(t, f, K, 3 * K, OUT))
    assert out == 2 * 512 * 3 * K
    assert peak >= 2 * K * 3 * K + out  # the whole weight in bf16 beside the output


def test_eight_bits_multiply_into_int32() -> None:
    t, f = written(quant="int8", dtype="fp16")
    peak, out = after(t, project(t, f, K, 2 * K, OUT))
    assert out == 2 * 512 * 2 * K
    assert peak >= (4 + 2) * 512 * 2 * K + 512 * K  # int32 and fp16 products, the input in a byte
    t, f = written(quant="int8", dtype="bf16")
    assert after(t, project(t, f, K, 2 * K, OUT))[0] > peak  # bf16 goes by way of fp16


def test_rotation_of_all_or_a_part() -> None:
    n = 512 * K
    t, _ = written()
    # x·cos, rotate_half's result and x·sin, or the two products and the sum: three at once
    assert after(t, rotate(t, n, n, OUT)) == (3 * n, n)
    t, _ = written()
    # of a quarter three at once; then that part and the whole, joined
    assert after(t, rotate(t, n, n // 4, OUT)) == (n // 4 + n, n)


@pytest.mark.parametrize(
    ("name", "live"),
    [("silu", 1), ("gelu", 1), ("relu", 1), ("relu2", 2), ("quick_gelu", 2), ("gelu_new", 3), ("gelu_fast", 4)],
)
def test_activation_functions(name: str, live: int) -> None:
    t, _ = written()
    peak, out = after(t, activate(t, 512 * K, name))
    assert out == 512 * K
    assert peak >= live * 512 * K


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_fast", "quick_gelu", "relu2", "gelu_pytorch_tanh"])
def test_activation_functions_against_transformers(name: str) -> None:
    """Most elements that the function's own code has live at once beside its input, followed by weak references."""
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    class Follow(TorchDispatchMode):  # type: ignore[misc]
        """Bytes of storages that are alive, and the most there were."""

        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = 0
            self.seen: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in self.seen:
                storage, n = out.untyped_storage(), out.untyped_storage().nbytes()
                self.seen.add(key := storage._cdata)
                self.live += n
                self.peak = max(self.peak, self.live)
                weakref.finalize(out, self.gone, key, n)
            return out

        def gone(self, key: int, n: int) -> None:
            self.seen.discard(key)
            self.live -= n

    x = torch.empty(512, K, dtype=torch.bfloat16, device="meta")
    follow = Follow()
    follow.seen.add(x.untyped_storage()._cdata)
    with torch.no_grad(), follow:
        activations.ACT2FN[name](x)
    t, f = written()
    assert after(t, activate(t, f.bytes(K), name))[0] == follow.peak
