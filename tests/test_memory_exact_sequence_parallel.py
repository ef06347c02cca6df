"""Sequence parallelism by hand arithmetic: what shrinks by tp, what a block gathers and keeps, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfvram import Request, estimate
from hfvram.errors import HfvramError
from hfvram.memory.timeline import Timeline

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES  # noqa: E402

from hfvram.memory.exact.simulate import simulate  # noqa: E402

pytestmark = pytest.mark.slow

TOKENS, HIDDEN, LAYERS = 2048, 512, 4
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MOE = {**TINY, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


def run(config: dict[str, Any] = TINY, **options: Any) -> Timeline:
    defaults = {"mode": "train", "dtype": "bf16", "ctx": TOKENS, "method": "simulate", "tp": 2}
    asked = {**defaults, **options}
    return simulate(config, None, Request(**{"gpus": asked["tp"], **asked}))


def saved(**options: Any) -> int:
    """Bytes that stand when the first backward pass starts."""
    timeline = run(**options)
    start = next(event for event, phase in timeline.marks if phase == "backward")
    return sum(timeline.sizes[handle] for handle in timeline.live(start))


def refusal(**options: Any) -> str:
    with pytest.raises(HfvramError) as raised:
        run(**{"sp": True, **options})
    assert raised.value.kind == "usage"
    return raised.value.message


@pytest.mark.parametrize("tp", [2, 4])
def test_norms_are_saved_for_a_part_of_the_sequence(tp: int) -> None:
    # A norm in bf16 saves its input in fp32 (4h), its normalized input in bf16 (2h) and 1/rms in fp32 (4); a layer has
    # two, the model one more. What attention, MLP and head are given (2h each) is gathered whole, and saved so.
    norms = 2 * LAYERS + 1
    whole = TOKENS * norms * (6 * HIDDEN + 4)
    assert saved(tp=tp) - saved(tp=tp, sp=True) == whole - whole // tp


@pytest.mark.parametrize("tp", [2, 4])
def test_checkpointing_saves_a_part_of_each_layers_input(tp: int) -> None:
    whole = TOKENS * (LAYERS * 2 * HIDDEN + 6 * HIDDEN + 4)  # and the last norm
    options = {"tp": tp, "gradient_checkpointing": True}
    assert saved(**options) - saved(**options, sp=True) == whole - whole // tp


def test_experts_are_given_whole_sequences_and_norms_are_not() -> None:
    whole = TOKENS * (2 * LAYERS + 1) * (6 * HIDDEN + 4)
    assert saved(config=MOE) - saved(config=MOE, sp=True) == pytest.approx(whole / 2, rel=0.01)


def test_each_block_gathers_once() -> None:
    timeline = run(sp=True)
    start = next(event for event, phase in timeline.marks if phase == "backward")
    kept = [timeline.made[h][0] for h in timeline.live(start) if timeline.sizes[h] == TOKENS * HIDDEN * 2]
    gathered = [name for name in kept if name.endswith(("self_attn", "mlp"))]
    blocks = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("mlp", "self_attn")]
    assert sorted(gathered) == blocks


def test_what_a_rank_holds_is_the_same() -> None:
    def weights(**options: Any) -> int:
        timeline = run(**options)
        standing = timeline.live(timeline.restarts[-1])
        return sum(timeline.sizes[h] for h in standing if timeline.tags[h].category == "weights")

    assert weights(sp=True) == weights()
    sharded = {"gpus": 4, "fsdp": "full_shard"}
    assert weights(sp=True, **sharded) == weights(**sharded)


def test_with_fsdp_and_with_adapters() -> None:
    sharded = {"gpus": 4, "fsdp": "full_shard"}
    whole = TOKENS * (2 * LAYERS + 1) * (6 * HIDDEN + 4)
    assert saved(**sharded) - saved(**sharded, sp=True) == whole // 2
    assert saved(mode="lora", sp=True) < saved(mode="lora")


def test_one_pass_without_gradients() -> None:
    def peak(**options: Any) -> int:
        return run(mode="inference", **options).fullest_bytes()

    assert peak(phase="encode", sp=True) <= peak(phase="encode")
    cache = run(mode="inference", phase="prefill", sp=True).cache_bytes
    assert cache == LAYERS * 2 * (4 // 2) * 64 * TOKENS * 2  # keys and values of half of the 4 heads, whole sequences


def test_styles_of_transformers_are_put_back() -> None:
    before = dict(ALL_PARALLEL_STYLES.items())
    run(sp=True)
    with pytest.raises(HfvramError):
        run({**TINY, "num_key_value_heads": 1}, sp=True)
    assert dict(ALL_PARALLEL_STYLES.items()) == before
    assert not torch._C._get_dtensor_allow_implicit_replication()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ctx": 2047}, "--ctx 2047 is not divisible by --tp 2: valid are 2046 and 2048"),
        ({"ctx": 3, "tp": 4}, "valid are 4"),
        ({"tp": 1, "gpus": 1}, "valid is --tp 2 and more"),
        ({"mode": "inference", "phase": "generate", "new_tokens": 4}, "valid are --phase prefill, encode"),
        ({"mode": "lora", "gpus": 4, "fsdp": "full_shard"}, "trains without --fsdp"),
        ({"config": {**TINY, "model_type": "jamba"}}, "has none that --tp splits"),
    ],
)
def test_what_cannot_be_split_so(options: dict[str, Any], words: str) -> None:
    assert words in refusal(**options)


def test_the_road(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": TOKENS}))
    options = {"mode": "train", "method": "simulate", "dtype": "bf16", "ctx": TOKENS, "tp": 2}
    whole, split = (estimate(str(tmp_path), **options, sp=sp) for sp in (False, True))
    assert split.peak_allocated_bytes < whole.peak_allocated_bytes
    assert any("Megatron-LM gathers again" in warning for warning in split.warnings)
    assert sum(item.bytes for item in split.items) == split.peak_allocated_bytes
