"""Repeated layers: written five times and stretched, against written whole."""

import pytest

from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.stretch import plan
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.model.layers import Layer
from hfvram.request import Request

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "num_attention_heads": 4}
LLAMA = SIZES | {"model_type": "llama", "num_key_value_heads": 2, "num_hidden_layers": 13}
GEMMA = SIZES | {"model_type": "gemma2", "num_key_value_heads": 2, "num_hidden_layers": 15, "head_dim": 16}
GEMMA |= {"sliding_window": 8}


def events(t: Timeline) -> list[int]:
    """Sizes in order, negative where freed; what is freed between two allocations sorted."""
    out: list[int] = []
    freed: list[int] = []
    for event in t.events:
        if event < 0:
            freed.append(-t.sizes[~event])
            continue
        out += [*sorted(freed), t.sizes[event]]
        freed = []
    return out + sorted(freed)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["one kind", "two kinds in turns"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpoint_every": 2},
        {"grad_accum": 4, "optimizer": "adamw_torch"},
        {"dtype": "fp32", "mixed_precision": "bf16", "optimizer": "adafactor"},
        {"attention": "eager", "optimizer": "galore_adamw"},
    ],
    ids=str,
)
def test_stretched_as_written_whole(config: dict[str, object], options: dict[str, object]) -> None:
    request = Request.from_dict({"mode": "train", "ctx": 32, "dtype": "bf16", **options})
    short, whole = timeline(infer(config), request), timeline(infer(config), request, whole=True)
    assert events(short) == events(whole)
    assert short.marks == whole.marks
    assert replay(short) == replay(whole)
    for name in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(short, name) == getattr(whole, name) > 0


def test_what_does_not_repeat_often_is_written_whole() -> None:
    a, b = Layer(), Layer(norm="layer")
    assert plan([a] * 5).groups == 0
    assert plan([a] * 6).groups == 6
    assert [x for x, _ in plan([b, *[a] * 6]).layers] == [b, *[a] * 5]
