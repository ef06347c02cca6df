"""A training step by formula: a Llama's by hand, and many models against their own code, event by event."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request

SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 128}
GROUPED = SMALL | {"num_key_value_heads": 2}
LLAMA = GROUPED | {"model_type": "llama"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, all heads": SMALL | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": GROUPED | {"model_type": "mistral", "sliding_window": 16},
    "qwen2": GROUPED | {"model_type": "qwen2"},
    "qwen3": GROUPED | {"model_type": "qwen3", "head_dim": 32},
    "gemma": GROUPED | {"model_type": "gemma", "head_dim": 16},
    "gemma2": GROUPED | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "starcoder2": GROUPED | {"model_type": "starcoder2"},
    "granite": GROUPED | {"model_type": "granite", "embedding_multiplier": 12.0},
    "olmo2": GROUPED | {"model_type": "olmo2"},
    "arcee": GROUPED | {"model_type": "arcee"},
    "gpt_neox": SMALL | {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4},
}
TRUTH = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"


def formed(config: dict[str, Any], on_meta: bool = False, **options: Any) -> Timeline:
    options = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none"} | options
    return timeline(infer(config), Request.from_dict(options), on_meta)


def live(t: Timeline, phase: str) -> dict[str, int]:
    """What stands at the first mark of this phase, by name."""
    totals: dict[str, int] = {}
    at = next(at for at, name in t.marks if name == phase)
    for handle in t.live(at):
        name = t.tags[handle].name
        totals[name] = totals.get(name, 0) + t.sizes[handle]
    return totals


def test_what_a_llama_keeps_for_its_backward() -> None:
    """32 tokens: h 64, f 96, 4 heads and 2 KV heads of 16, V 256; 2 layers; bf16."""
    rows = 32
    kept = live(formed(LLAMA), "backward")
    saved = {name.removesuffix(" (saved activations)"): n for name, n in kept.items()}
    norms = 2 * 2 + 1
    assert saved["normalization in fp32"] == norms * rows * 64 * 4
    # Each norm keeps what it cast back and its output, which the products after it need.
    assert saved["normalization, output"] == norms * 2 * rows * 64 * 2
    assert saved["feed-forward, gate and up"] == 2 * 2 * rows * 96 * 2
    assert saved["feed-forward, activation function"] == saved["feed-forward, product"] == 2 * rows * 96 * 2
    # Values as projected; queries and keys rotated; the output and its log-sum-exp.
    assert saved["keys and values"] == 2 * rows * 2 * 16 * 2
    assert saved["rotary embedding, temporaries"] == 2 * rows * (4 + 2) * 16 * 2
    assert saved["attention output"] == 2 * rows * 4 * 16 * 2
    assert saved["attention, log-sum-exp"] == 2 * 4 * rows * 4
    assert saved["log-probabilities"] == rows * 256 * 4 + 8  # the loss and its weight beside them
    assert saved["logits"] == rows * 256 * 2
    # With checkpointing a layer keeps its input alone.
    kept = live(formed(LLAMA, gradient_checkpointing=True), "backward")
    assert kept["hidden states (saved activations)"] == rows * 64 * 2
    assert "feed-forward, product (saved activations)" not in kept


def test_gradients_and_states_in_raw_sizes() -> None:
    t = formed(LLAMA)
    parameters = 2 * 256 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64) + 64
    tensors = 2 + 2 * 9 + 1
    assert t.trainable_parameters == parameters
    assert t.gradients_bytes == 2 * parameters
    assert t.optimizer_bytes == 4 * parameters + 4 * tensors
    assert formed(LLAMA, optimizer="sgd").optimizer_bytes == 0


@pytest.mark.parametrize(
    "options",
    [{"padding": True, "attention": "flash_attention_2"}],
    ids=str,
)
def test_no_formula_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(HfvramError, match="--method simulate") as caught:
        formed(LLAMA, **options)
    assert caught.value.kind == "usage"


def test_another_head_is_said() -> None:
    with pytest.raises(HfvramError, match="LlamaForTokenClassification has no formula"):
        formed(LLAMA | {"architectures": ["LlamaForTokenClassification"]})
    with pytest.raises(HfvramError, match="--quant nf4 has no formula"):
        formed(LLAMA, quant="nf4")


def test_an_unknown_type_is_said() -> None:
    with pytest.raises(HfvramError, match="model type recurrent_gemma has no formula"):
        formed(GROUPED | {"model_type": "recurrent_gemma"})


def test_peaks_of_an_h100() -> None:
    """Every measured case that has a formula: allocated to 0.03 %, reserved to 0.25 %, with experts to 1.5 %.

    State spaces to 0.05 % and 1 %: of mamba-130m's 3 GiB 12 MiB are remainders of blocks, which count as allocated,
    and both engines leave one MiB of them where the GPU did not.
    """
    answered = 0
    for case in map(json.loads, TRUTH.read_text().splitlines()):
        if case["request"]["mode"] != "train" or case["request"].get("gpus"):
            continue
        try:
            peaks = replay(formed(case["config"], **case["request"]))
        except HfvramError:
            continue
        answered += 1
        measured = case["measured"]
        scans = case["config"]["model_type"].startswith("mamba")
        allocated = 5e-4 if scans else 3e-4
        assert peaks.allocated_bytes == pytest.approx(measured["peak_allocated_bytes"], rel=allocated), case["id"]
        reserved = 1.5e-2 if "num_experts_per_tok" in case["config"] else 1e-2 if scans else 2.5e-3
        assert peaks.reserved_bytes == pytest.approx(measured["peak_reserved_bytes"], rel=reserved), case["id"]
    assert answered >= 5


def sequence(t: Timeline) -> list[int]:
    """Sizes in order since the model stood, negative where freed; frees between two allocations sorted; no end."""
    out: list[int] = []
    freed: list[int] = []
    for event in t.events[t.restarts[-1] :]:
        size = t.sizes[event if event >= 0 else ~event]
        if event < 0:
            freed += [-size] if size else []
        elif size:
            out += [*sorted(freed), size]
            freed = []
    return out


def held(config: dict[str, Any], **options: Any) -> None:
    """The formula's training of a configuration is event by event that of the model's own code, its sums alike."""
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    request = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "simulate"} | options
    exact = simulate(config, None, Request.from_dict(request))
    formula = formed(config, on_meta=True, **options)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


OPTIONS: list[dict[str, Any]] = [
    {"batch": 2},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "checkpoint_every": 2, "batch": 2},
    {"dtype": "fp32", "grad_accum": 2},
    {"attention": "eager", "batch": 2, "dtype": "fp32"},
    {"padding": True, "batch": 2},
    {"padding": True, "batch": 2, "attention": "eager", "gradient_checkpointing": True},
    {"attention": "flash_attention_2"},
    {"attention": "flash_attention_2", "batch": 2, "gradient_checkpointing": True},
    {"dtype": "fp32", "mixed_precision": "bf16", "batch": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_event_by_event_as_the_models_own_code(name: str, options: dict[str, Any]) -> None:
    if "flash" in options.get("attention", "") and name == "bloom":
        pytest.skip("BLOOM has eager attention alone")
    held(MODELS[name], **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        *("adamw_torch", "adamw_torch_loop", "sgd_momentum", "adagrad", "rmsprop", "adafactor", "adamw_8bit"),
        *("paged_adamw_8bit", "ademamix", "lion_8bit", "galore_adamw", "apollo_adamw", "muon"),
    ],
)
def test_optimizers_event_by_event(optimizer: str) -> None:
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    options = {"mode": "train", "ctx": 16, "dtype": "bf16", "quant": "none", "optimizer": optimizer}
    exact = simulate(LLAMA, None, Request.from_dict(options | {"method": "simulate"}))
    formula = formed(LLAMA, on_meta=True, ctx=16, optimizer=optimizer)
    assert sequence(formula) == sequence(exact)
    for fact in ("optimizer_bytes", "managed_bytes"):
        assert getattr(formula, fact) == getattr(exact, fact)
