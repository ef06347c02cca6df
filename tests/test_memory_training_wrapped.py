"""LoRA around experts that are one tensor and around routers: by hand, and event by event as PEFT's own code."""

from typing import Any

import pytest
from test_memory_training_moe import GRANITE, MODELS
from test_memory_training_train import live, sequence

from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request

NAMES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")
NAMES += ("qwen2_moe", "granitemoe")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "batch": 2},
    {"adapter_dtype": "bf16", "lora_r": 32, "grad_accum": 2},  # scaled by 1
    {"mode": "qlora", "quant": "nf4", "rslora": True},
    {"fsdp": "full_shard", "gpus": 4},
]


def asked(**options: Any) -> Request:
    return Request.from_dict({"mode": "lora", "ctx": 32, "dtype": "bf16", "quant": "none", "lora_r": 8} | options)


def adapted(name: str, on_meta: bool = False, **options: Any) -> Timeline:
    return timeline(infer(MODELS[name]), asked(**options), on_meta)


def test_adapters_of_experts_by_hand() -> None:
    """OLMoE of h 64, f 96, 8 experts, two layers; ranks of 8, twice that for gate and up, which are one tensor."""
    up, down = 8 * 16 * (64 + 2 * 96), 8 * 8 * (96 + 64)
    assert adapted("olmoe", lora_targets="gate_proj,up_proj").trainable_parameters == 2 * up
    assert adapted("olmoe", lora_targets="down_proj").trainable_parameters == 2 * down
    assert adapted("olmoe", lora_targets="gate").trainable_parameters == 2 * 8 * (64 + 8)
    attention = 8 * (2 * (64 + 64) + 2 * (64 + 32))
    assert adapted("olmoe").trainable_parameters == 2 * (up + down + 8 * (64 + 8) + attention)


def test_dense_and_shared_feed_forwards_are_left_out() -> None:
    """DeepSeek-V2, one dense layer and one of 8 experts of f 48: those names stand for the experts' tensors."""
    experts = 8 * 16 * (64 + 2 * 48) + 8 * 8 * (48 + 64)
    names = ("gate_proj", "up_proj", "down_proj")
    assert adapted("deepseek_v2", lora_targets=names).trainable_parameters == experts


def test_the_sum_is_kept_for_the_tokens_gradient() -> None:
    """Of both tensors in both layers, in the weights' dtype; and the factors, for each other's gradient."""
    kept = live(adapted("olmoe"), "backward")
    both = 8 * 64 * 96 * 3
    assert kept["parameters with their adapters' product (saved activations)"] == 2 * 2 * (both + 8 * 64)
    factors = 8 * 16 * (64 + 2 * 96) + 8 * 8 * (96 + 64)
    assert kept["LoRA, adapters in the parameter's dtype (saved activations)"] == 2 * 2 * factors


def test_what_peft_refuses_is_said() -> None:
    for options, why in (
        ({"lora_targets": "gate_proj"}, "gate_proj can't be adapted without up_proj"),
        ({"lora_dropout": 0.1}, "PEFT has none around mlp.gate.weight"),
        ({"dora": True}, "--dora: PEFT has none around mlp.gate.weight"),
        ({"lora_targets": r".*layers\.1\..*proj"}, "name layers"),
        ({"lora_targets": "query"}, "matches no layer"),
    ):
        with pytest.raises(HfvramError, match=why) as caught:
            adapted("olmoe", **options)
        assert caught.value.kind == "usage"
    with pytest.raises(HfvramError, match="--mode lora of GraniteMoeForCausalLM"):
        timeline(infer(GRANITE), asked(lora_targets="q_proj"))


def test_many_layers_are_stretched_as_if_written() -> None:
    deep = infer(MODELS["olmoe"] | {"num_hidden_layers": 9})
    for options in ({}, {"gradient_checkpointing": True}, {"mode": "qlora", "quant": "nf4"}):
        short, whole = (timeline(deep, asked(**options), whole=whole) for whole in (False, True))
        assert sequence(short) == sequence(whole)
        assert replay(short) == replay(whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_event_by_event_as_pefts_own_code(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from hfvram.memory.exact.simulate import simulate

    exact = simulate(MODELS[name], None, asked(method="simulate", **options))
    formula = adapted(name, on_meta=True, **options)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)
