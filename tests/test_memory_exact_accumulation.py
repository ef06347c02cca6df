"""Gradients added up on meta as CUDA adds them: in place where nobody else holds the first one."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hfvram.memory.exact.run import Run  # noqa: E402

pytestmark = pytest.mark.slow
ROWS, WIDTH = 1000, 8


def tensors_in_backward(autocast: bool) -> int:
    """How many tensors as large as a tied weight a backward pass makes, in fp32."""
    run = Run()
    weight = torch.nn.Parameter(torch.empty(ROWS, WIDTH, device="meta"))
    ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    with run.on_cuda(torch.nn.Module()), run.autocast.stands_in():
        with run.autocast.region(torch.bfloat16, autocast):
            embedded = torch.nn.functional.embedding(ids, weight)
            loss = torch.nn.functional.linear(embedded.tanh(), weight).float().sum()
        before = len(run.timeline.sizes)
        torch.autograd.backward([loss])
    return sum(n == ROWS * WIDTH * 4 for n in run.timeline.sizes[before:])


def test_a_tied_weights_gradients_are_as_the_profiler_shows_them() -> None:
    """With autocast the head's gradient is a copy in fp32, into which the embedding's goes; without, it is a view of a
    product that is still there, and their sum is a third."""
    assert tensors_in_backward(autocast=True) == 2
    assert tensors_in_backward(autocast=False) == 3


@pytest.mark.parametrize(("autocast", "operator"), [(True, "aten::add_"), (False, "aten::add")])
def test_so_does_pytorch_on_the_cpu(autocast: bool, operator: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(ROWS, WIDTH))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embedded = torch.nn.functional.embedding(ids, weight)
        loss = torch.nn.functional.linear(embedded.tanh(), weight).float().sum()
    with torch.profiler.profile(record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    events: list[Any] = profile.events()
    assert [e.name for e in events if e.name.startswith("aten::add") and e.input_shapes[0] == [ROWS, WIDTH]] == [
        operator
    ]
