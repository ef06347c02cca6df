"""Ring attention: each allocation of PyTorch's own loop over stand-in kernels, and by hand what a rank keeps."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.timeline import Standing, Timeline
from hfvram.memory.training import ring_attention as ours
from hfvram.memory.training.attention import OUT
from hfvram.memory.training.operators import attach
from hfvram.memory.training.ring_attention import ring_attention
from hfvram.memory.training.tape import Input, Ring, Tape
from hfvram.memory.training.tensors import Tensor
from tests.test_memory_training_train import sequence

SHAPES = (2, 8, 64, 64), (2, 4, 64, 64)


def run(
    ring: Ring, dtype: str = "bf16", shapes: tuple[tuple[int, ...], ...] = SHAPES, on_meta: bool = False
) -> Timeline:
    """Forward and backward of queries, keys and values that lie as projections do: (b, s, heads, d)."""
    t = Timeline(Standing(()))
    t.restart()
    tape = Tape(t, on_meta=on_meta)
    tape.ring = ring
    leaf = tape.new((), dtype)
    leaf.node = Input(leaf)

    def projected(shape: tuple[int, ...]) -> Tensor:
        _, heads, s, d = shape
        x = tape.new(shape, dtype, (s * heads * d, d, heads * d, 1))
        return attach(x, tape.record(lambda *_: (None,), (leaf,)))

    q, k, v = projected(shapes[0]), projected(shapes[1]), projected(shapes[1])
    out = ring_attention(tape, q, k, v, gqa=True, p=0.0, tag=OUT)
    del q, k, v
    tape.mark("backward")
    tape.backward(out)
    return t


def test_what_is_kept() -> None:
    """b 2, 8 heads and 4 KV heads of 64, 64 of 256 tokens: as of 64 tokens alone, the ring leaves nothing."""
    t = run((4, 1))
    kept = t.live(next(at for at, name in t.marks if name == "backward"))
    tensor = 2 * 8 * 64 * 64 * 2
    sizes = sorted(t.sizes[h] for h in kept)
    assert sizes == sorted([2, tensor, tensor // 2, tensor // 2, tensor, 2 * 8 * 64 * 4, 8, 8])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_what_circulates(ranks: int) -> None:
    own = 2 * 4 * 64 * 64 * 2 * 2  # keys and values
    t = run((ranks, 0))
    sizes = {tag.name: size for size, tag in zip(t.sizes, t.tags, strict=True)}
    assert sizes["context parallel, keys and values of all ranks"] == ranks * own
    found = [
        size for size, tag in zip(t.sizes, t.tags, strict=True) if size == 2 * own and not tag.name.startswith("c")
    ]
    assert len(found) >= 2 * ranks  # in fp32, packed and received once a step


def test_the_last_rank_merges_whole_outputs() -> None:
    """A first rank attends with half its queries at all later steps; the last one merges whole outputs."""
    assert run((4, 3)).fullest_bytes() >= run((4, 0)).fullest_bytes()


def test_heads_without_a_kernel_are_said() -> None:
    with pytest.raises(HfvramError, match="--cp needs a kernel"):
        run((2, 0), "fp32")  # keys for groups of heads are for flash and cuDNN


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("heads", [4, 8])
def test_as_pytorchs_loop(ranks: int, rank: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    shapes = SHAPES[0], (2, heads, 64, 64)
    monkeypatch.setattr(ours, "kernel_for", lambda *_: "flash")
    monkeypatch.setattr(ours, "fused_gradient", without_scratch(ours.fused_gradient))
    formula = run((ranks, rank), shapes=shapes, on_meta=True)
    assert sequence(formula)[1:] == looped(ranks, rank, shapes)


def without_scratch(gradient: Any) -> Any:
    def called(kernel: Any, t: Tape, *args: Any) -> Any:
        moment, t.moment = t.moment, lambda *_: None  # type: ignore[method-assign]
        found = gradient(kernel, t, *args)
        t.moment = moment  # type: ignore[method-assign]
        return found

    return called


def looped(ranks: int, rank: int, shapes: tuple[tuple[int, ...], ...]) -> list[int]:
    """The same by PyTorch's functions on the meta device, of which the kernels and collectives are stand-ins."""
    import torch
    from torch.distributed.tensor.experimental._context_parallel import _attention as torchs

    from hfvram.memory.exact.tracker import Tracker

    def lies(shape: tuple[int, ...]) -> Any:
        b, heads, s, d = shape
        return torch.empty(b, s, heads, d, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    def kernel(q: Any, k: Any, v: Any, **_: Any) -> tuple[Any, ...]:
        b, heads, s, _d = q.shape
        seeds = (torch.empty((), dtype=torch.int64, device="meta") for _ in range(2))
        return lies(tuple(q.shape)), torch.empty(b, heads, s, device="meta"), *seeds

    def gradient(query: Any, key: Any, value: Any, **_: Any) -> tuple[Any, ...]:
        return tuple(lies(tuple(x.shape)) for x in (query, key, value))

    timeline = Timeline(Standing(()))
    timeline.restart()
    sent: list[Any] = []

    def gather(x: Any, gather_dim: int, group: Any) -> Any:
        sent.append(x)
        return torch.empty(ranks * x.numel(), dtype=x.dtype, device="meta")

    def permute(x: Any, order: Any, group: Any) -> Any:
        return torch.empty_like(x)

    def wait(x: Any) -> Any:
        sent.clear()
        return x

    class Group:
        pass

    patch = pytest.MonkeyPatch()
    for name, value in {"get_rank": lambda _: rank, "get_world_size": lambda _: ranks, "ProcessGroup": Group}.items():
        patch.setattr(torchs.dist, name, value)
    patch.setattr(torchs.ft_c, "all_gather_single", gather)
    patch.setattr(torchs.ft_c, "permute_tensor", permute)
    patch.setattr(torchs, "_maybe_wait", wait)
    try:
        with Tracker(timeline), torch.no_grad():
            q, k, v = lies(shapes[0]), lies(shapes[1]), lies(shapes[1])
            found = torchs._templated_ring_attention(Group(), 2, kernel, q, k, v, is_causal=True)
            out, log_sum, *seeds = found
            del found
            grad = torch.empty_like(out)
            of = torchs._templated_ring_attention_backward(
                Group(), 2, gradient, grad, "grad_out", q, k, v, out, log_sum, True
            )
            del q, k, v, out, log_sum, seeds, grad, of
    finally:
        patch.undo()
    return sequence(timeline)
