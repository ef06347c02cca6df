"""What stands at the peak, tensor by tensor, in words."""

import pytest

from hfvram.answer.estimate import LiveTensor
from hfvram.answer.largest import largest
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Category, Standing, Tag, Timeline


def written(*tensors: tuple[str, str, Category, str, int]) -> Timeline:
    """A timeline of (path, tag's name, category, operator, bytes), which all stand at the end."""
    timeline = Timeline(Standing(()))
    for path, name, category, operator, nbytes in tensors:
        handle = timeline.alloc(nbytes, Tag(name, category))
        timeline.made[handle] = path, operator, (nbytes // 4,), "torch.float32"
    return timeline


def told(timeline: Timeline, number: int = 10, alike: bool = True) -> list[LiveTensor]:
    return list(largest(timeline, replay(timeline), number, alike))


def test_largest_first_layers_together() -> None:
    timeline = written(
        *((f"layers.{i}.mlp", "layers.*.mlp (saved activations)", "activations", "mm", 4096) for i in range(3)),
        ("head", "head", "weights", "empty", 8192),
        ("layers.1.mlp", "layers.*.mlp (saved activations)", "activations", "silu", 4096),
    )
    found = told(timeline)
    assert [(t.path, t.what, t.operator, t.bytes, t.count) for t in found] == [
        ("head", "weights", "", 8192, 1),
        ("layers.0.mlp", "saved activations", "mm", 4096, 3),
        ("layers.1.mlp", "saved activations", "silu", 4096, 1),
    ]
    assert (found[0].shape, found[0].dtype) == ((2048,), "fp32")
    assert [t.path for t in told(timeline, alike=False)] == [
        "head",
        "layers.0.mlp",
        "layers.1.mlp",
        "layers.2.mlp",
        "layers.1.mlp",
    ]


def test_no_more_than_asked_but_all_that_are_alike_are_counted() -> None:
    tensors = [(f"layers.{i % 9}.{'ab'[i // 9]}", "layers.*.x", "weights", "empty", 1024) for i in range(18)]
    found = told(written(*tensors, ("small", "small", "weights", "empty", 4)), 1)  # type: ignore[arg-type]
    assert [(t.path, t.count) for t in found] == [("layers.0.a", 9)]
    assert len(told(written(*tensors), 5, alike=False)) == 5  # type: ignore[arg-type]


def test_what_was_freed_is_not_there_and_formulas_have_no_tensors() -> None:
    timeline = written(("a", "a", "activations", "mm", 1 << 20), ("b", "b", "activations", "mm", 1 << 10))
    timeline.free(0)
    timeline.alloc(1 << 21, Tag("cuBLAS workspace", "workspace"))
    assert [(t.path, t.what, t.bytes) for t in told(timeline)] == [
        ("", "cuBLAS workspace", 1 << 21),
        ("b", "activations", 1 << 10),
    ]
    formula = Timeline(Standing(()))
    formula.alloc(1024, Tag("weights", "weights"))
    assert told(formula) == []


@pytest.mark.parametrize(
    ("path", "name", "category", "operator", "shown"),
    [
        ("lm_head", "lm_head", "weights", "empty", "lm_head: weights"),
        ("l.3.q.bias", "l.*.q", "weights", "empty", "l.3.q.bias: weights"),
        ("l.3.q", "gradients", "gradients", "mm", "l.3.q: gradients"),
        ("l.3.q", "optimizer states: exp_avg", "optimizer", "zeros", "l.3.q: optimizer states: exp_avg"),
        ("l.3", "l.* (recomputed)", "activations", "_to_copy", "l.3: recomputed activations (cast)"),
        ("l.3", "gradients of activations", "activations", "mm", "l.3: gradients of activations (mm)"),
        ("l.3", "keys, values and states", "cache", "cat", "l.3: keys, values and states (concatenation)"),
        ("inputs", "inputs", "inputs", "empty", ": inputs"),
        ("gradient clipping", "gradient clipping", "activations", "mul", ": gradient clipping (product)"),
    ],
)
def test_words(path: str, name: str, category: Category, operator: str, shown: str) -> None:
    (tensor,) = told(written((path, name, category, operator, 512)))
    by = f" ({tensor.operator})" if tensor.operator else ""
    assert f"{tensor.path}: {tensor.what}{by}" == shown
