"""FSDP2 and DDP by formula: against PyTorch's own code event by event, stream by stream, and against an H100."""

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

TRUTH = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
SHARDED = [c for c in map(json.loads, TRUTH.read_text().splitlines()) if c["request"].get("fsdp")]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,  # more than are written (`stretch`)
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LAYER = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64
PARAMETERS = 2 * 256 * 64 + 7 * LAYER + 64


def asked(**options: Any) -> Request:
    return Request.from_dict({"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "gpus": 4} | options)


def formed(config: dict[str, Any] = LLAMA, on_meta: bool = False, **options: Any) -> Timeline:
    return timeline(infer(config), asked(**options), on_meta)


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


def forget_buffers(exact: Timeline) -> None:
    """DDP sends buffers, joined: a Llama's rotary frequencies, which formulas leave out as too small."""
    for handle in set(exact.events[exact.restarts[-1] :]) & exact.made.keys():
        if exact.tags[handle].name == "gradients in DDP's buckets" and "aten.cat" in str(exact.made[handle][1]):
            assert exact.sizes[handle] == 2 * 8 * 4
            exact.sizes[handle] = 0


FSDP: list[dict[str, Any]] = [
    {"fsdp": "full_shard"},
    {"fsdp": "shard_grad_op", "gradient_checkpointing": True},
    {"fsdp": "full_shard", "gpus": 3, "mixed_precision": "bf16", "dtype": "fp32", "gradient_checkpointing": True},
    {"fsdp": "full_shard", "gpus": 2, "gradient_checkpointing": True, "checkpoint_every": 2},
    {"fsdp": "full_shard", "mixed_precision": "bf16"},
    {"fsdp": "full_shard", "grad_accum": 2, "mixed_precision": "bf16", "dtype": "fp32"},
    {"fsdp": "hybrid_shard", "gpus": 16, "mixed_precision": "bf16", "dtype": "fp32"},
    {"fsdp": "hybrid_shard", "gpus": 4, "grad_accum": 2},
    {"fsdp": "full_shard", "optimizer": "adafactor"},
    {"fsdp": "full_shard", "optimizer": "adamw_8bit"},
    {"fsdp": "full_shard", "optimizer": "muon", "dtype": "fp32"},
]
DDP: list[dict[str, Any]] = [
    {},
    {"grad_accum": 2, "gradient_checkpointing": True},
    {"dtype": "fp32"},
    {"optimizer": "adamw_torch"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*FSDP, *DDP], ids=str)
def test_event_by_event_as_pytorchs_own_code(options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    exact = simulate(LLAMA, None, asked(method="simulate", **options))
    formula = formed(on_meta=True, **options)
    forget_buffers(exact)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


OTHERS: list[dict[str, Any]] = [
    {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    {"model_type": "bloom", "vocab_size": 256, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    LLAMA | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True},
    LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True, "num_hidden_layers": 3},
    LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3},
    {"model_type": "distilbert", "vocab_size": 256, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
    | {"architectures": ["DistilBertForMaskedLM"]},
]


@pytest.mark.slow
@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config["model_type"])
def test_other_layers_tied_heads_and_biases(config: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    options = {"fsdp": "full_shard", "gpus": 4, "gradient_checkpointing": True}
    exact = simulate(config, None, asked(method="simulate", **options))
    assert sequence(formed(config, on_meta=True, **options)) == sequence(exact)


def test_a_unit_within_a_unit() -> None:
    """Mamba's layers hold a norm of h 64, and their mixers are gathered apart: d 128, N 16, a step's rank of 4."""
    mamba = {"model_type": "mamba", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 16}
    t = formed(mamba, fsdp="full_shard", gpus=4)
    gathers = {n for n, tag in zip(t.sizes, t.tags, strict=True) if tag.name == "all-gather of FSDP"}
    convolution, projections = 128 * 4 + 128, 64 * 256 + 128 * (4 + 2 * 16) + 4 * 128 + 128 + 128 * 64
    root = 256 * 64 + 64
    assert gathers == {2 * 64, 2 * (convolution + projections + 128 * 16 + 128), 2 * root}


@pytest.mark.parametrize("case", SHARDED, ids=lambda c: c["id"])
def test_the_peaks_of_an_h100(case: dict[str, Any]) -> None:
    request = Request.from_dict({"quant": "none"} | case["request"])
    peaks = replay(timeline(infer(case["config"]), request))
    assert peaks.allocated_bytes == pytest.approx(case["measured"]["peak_allocated_bytes"], rel=1e-4)
    assert peaks.reserved_bytes == pytest.approx(case["measured"]["peak_reserved_bytes"], rel=1e-3)


def test_what_one_rank_holds() -> None:
    whole = formed(gpus=4)
    assert sum(whole.standing.bytes_by_tag.values()) == 2 * PARAMETERS
    assert whole.trainable_parameters == PARAMETERS
    quarter = formed(gpus=4, fsdp="full_shard")  # every dimension is a multiple of 4
    assert sum(quarter.standing.bytes_by_tag.values()) == 2 * PARAMETERS // 4
    assert quarter.gradients_bytes == 2 * PARAMETERS // 4
    assert quarter.optimizer_bytes == 2 * 2 * PARAMETERS // 4 + 4 * (3 + 9 * 7)  # and a step count each
    assert quarter.trainable_parameters == PARAMETERS
    # Rows that don't divide by 3: 86 of 256, 22 of 64, 11 of 32, 32 of 96.
    rows = 2 * 86 * 64 + 22 + 7 * (2 * 22 * 64 + 2 * 11 * 64 + 2 * 32 * 64 + 22 * 96 + 2 * 22)
    assert sum(formed(gpus=3, fsdp="full_shard").standing.bytes_by_tag.values()) == 2 * rows


def test_hybrid_shards_within_a_node() -> None:
    standing = [sum(formed(gpus=n, fsdp="hybrid_shard").standing.bytes_by_tag.values()) for n in (8, 16)]
    assert standing[0] == standing[1] == 2 * PARAMETERS // 8
    with pytest.raises(HfvramError, match="valid are up to 8 and its multiples"):
        formed(gpus=12, fsdp="hybrid_shard")


@pytest.mark.parametrize("options", [{"fsdp": "full_shard"}, {"fsdp": "shard_grad_op"}, {}], ids=str)
def test_more_gpus_never_take_more(options: dict[str, Any]) -> None:
    counts = (2, 4, 8, 16, 32)  # which divide all rows: others are padded
    peaks = [formed(ctx=128, **{**options, "gpus": n}).fullest_bytes() for n in counts]
    assert peaks == sorted(peaks, reverse=True)
    if options:
        assert peaks[-1] < peaks[0]
