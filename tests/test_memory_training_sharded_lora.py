"""LoRA over several GPUs: event by event as FSDP2's and DDP's own code, and DeepSpeed's parts by hand."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# Ranks of 8 on q, o (64 to 64), k, v (64 to 32), gate, up (64 to 96), down (96 to 64).
ADAPTERS = 7 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
PARAMETERS = 2 * 256 * 64 + 7 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64) + 64


def asked(**options: Any) -> Request:
    request = {"mode": "lora", "lora_r": 8, "ctx": 32, "dtype": "bf16", "quant": "none", "gpus": 4}
    return Request.from_dict(request | options)


def formed(on_meta: bool = False, **options: Any) -> Timeline:
    return timeline(infer(LLAMA), asked(**options), on_meta)


def sequence(t: Timeline) -> list[tuple[int, int]]:
    """Sizes and streams in order since the model stood, negative where freed; frees between two allocations sorted."""
    out: list[tuple[int, int]] = []
    freed: list[tuple[int, int]] = []
    for event in t.events[t.restarts[-1] :]:
        handle = event if event >= 0 else ~event
        size, stream = t.sizes[handle], t.streams.get(handle, 0)
        if event < 0:
            freed += [(-size, stream)] if size else []
        elif size:
            out += [*sorted(freed), (size, stream)]
            freed = []
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"fsdp": "full_shard"},
        {"fsdp": "full_shard", "gradient_checkpointing": True},
        {"fsdp": "shard_grad_op", "mixed_precision": "bf16", "dtype": "fp32"},
        {"fsdp": "full_shard", "adapter_dtype": "bf16", "grad_accum": 2},
    ],
    ids=str,
)
def test_event_by_event_as_pytorchs_own_code(options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from hfvram.memory.exact.simulate import simulate

    exact = simulate(LLAMA, None, asked(method="simulate", **options))
    formula = formed(on_meta=True, **options)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


def test_replicas_put_the_adapters_gradients_alone_in_buckets() -> None:
    t = formed()
    buckets = [t.sizes[h] for h in t.live(t.restarts[-1]) if "buckets" in t.tags[h].name]
    assert buckets == [4 * ADAPTERS]  # in fp32, as PEFT keeps them


def test_deepspeed_parts_the_adapters_states_and_everyones_weights() -> None:
    t = formed(zero=3)
    weights = sum(n for tag, n in t.standing.bytes_by_tag.items() if tag.category == "weights")
    assert weights == 2 * PARAMETERS // 4
    assert t.trainable_parameters == ADAPTERS
    assert t.optimizer_bytes == 12 * ADAPTERS // 4 + 4
    assert t.gradients_bytes == 2 * ADAPTERS // 4


def test_packed_weights_that_are_sharded_are_said() -> None:
    for options in ({"fsdp": "full_shard"}, {"zero": 3}):
        with pytest.raises(HfvramError, match="--quant nf4 with parameters that are sharded"):
            formed(mode="qlora", **(options | {"quant": "nf4"}))
    assert formed(mode="qlora", quant="nf4").fullest_bytes() > 0
