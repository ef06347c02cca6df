"""ZeRO by formula: DeepSpeed's partitions, buckets and gathers by hand, and what each stage must not need more of."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
LAYER = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 5632 + 2 * 2048
PARAMETERS = 2 * 32000 * 2048 + 22 * LAYER + 2048  # 1.1 B: TinyLlama
BUCKET = 500_000_000


def formed(**options: Any) -> Timeline:
    request = {"mode": "train", "ctx": 512, "dtype": "bf16", "quant": "none", "gpus": 4} | options
    return timeline(infer(LLAMA), Request.from_dict(request))


def standing(t: Timeline) -> dict[str, int]:
    """What stands when training starts, by name."""
    found = {tag.name: n for tag, n in t.standing.bytes_by_tag.items()}
    for handle in t.live(t.restarts[-1]):
        name = t.tags[handle].name
        found[name] = found.get(name, 0) + t.sizes[handle]
    return found


def most(t: Timeline, *names: str) -> int:
    """The most bytes of these names that are live at once."""
    live = top = 0
    for event in t.events:
        handle = event if event >= 0 else ~event
        if t.tags[handle].name in names:
            live += t.sizes[handle] if event >= 0 else -t.sizes[handle]
            top = max(top, live)
    return top


def elsewhere(t: Timeline, place: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for at, tag, n in t.elsewhere:
        if at == place:
            found[tag.name] = found.get(tag.name, 0) + n
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_masters_and_states_are_parted(stage: int) -> None:
    t = formed(zero=stage)
    stood = standing(t)
    assert stood["weights"] == 2 * PARAMETERS
    assert stood["master weights in fp32, one part of n"] == 4 * PARAMETERS // 4
    assert t.trainable_parameters == PARAMETERS
    assert t.optimizer_bytes == 12 * PARAMETERS // 4 + 4  # masters, two moments, and the count of steps
    assert t.gradients_bytes == 2 * PARAMETERS // (1 if stage == 1 else 4)
    assert most(t, "DeepSpeed's reduce bucket") == 2 * BUCKET
    # The step holds the part's gradients once more in fp32.
    assert most(t, "gradients of the optimizer step in fp32") == 4 * PARAMETERS // 4
    whole = most(t, "gradients")
    assert whole == 2 * PARAMETERS if stage == 1 else whole <= 2 * 32000 * 2048  # one at a time


def test_zero_3_parts_everything() -> None:
    t = formed(zero=3)
    stood = standing(t)
    assert stood["weights"] == 2 * PARAMETERS // 4  # all sizes are multiples of 4
    assert stood["gradients, one part of n"] == 2 * PARAMETERS // 4
    assert stood["DeepSpeed's reduce bucket"] == 2 * BUCKET
    assert stood["small parameters that stay whole"] == 2 * (2 * 22 + 1) * 2048
    assert sum(n for name, n in stood.items() if "bucket" not in name) >= (2 + 2 + 4) * PARAMETERS // 4


def test_fp32_keeps_no_second_copy_with_zero_3() -> None:
    name = "master weights in fp32, one part of n"
    assert name not in standing(formed(zero=3, dtype="fp32"))
    assert standing(formed(zero=2, dtype="fp32"))[name] == 4 * PARAMETERS // 4  # stages 1 and 2 copy theirs


def test_mixed_precision_is_the_dtype_of_the_whole_model() -> None:
    mixed = formed(zero=2, dtype="fp32", mixed_precision="bf16")
    assert mixed.fullest_bytes() == formed(zero=2).fullest_bytes()


def test_small_models_stay_gathered_until_their_backward_pass() -> None:
    """Parameters that come again within 1e9 others are not released: the head, and two passes of what lies behind."""
    t = formed(zero=3)
    gathered = most(t, "parameters gathered by DeepSpeed")
    norms = 2 * 2048
    left, kept = 10**9 - 2 * 32000 * 2048, 0
    while left > 2 * (LAYER - norms) and kept < 21:
        left -= 2 * (LAYER - norms)
        kept += 1
    assert 0 < kept < 21
    assert 2 * kept * (LAYER - norms) < gathered < 2 * (kept + 5) * LAYER


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"grad_accum": 2}, {"gpus": 16}], ids=str)
def test_a_higher_stage_never_keeps_more(options: dict[str, Any]) -> None:
    def states(stage: int) -> int:
        t = formed(zero=stage, **options)
        weights = sum(t.standing.bytes_by_tag.values())
        return weights + t.optimizer_bytes + t.gradients_bytes

    kept = [states(stage) for stage in (1, 2, 3)]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_gpus_never_take_more(stage: int) -> None:
    peaks = [formed(zero=stage, gpus=n, gradient_checkpointing=True).fullest_bytes() for n in (2, 4, 8, 16, 64)]
    assert peaks == sorted(peaks, reverse=True)


def test_gradients_that_accumulate_lie_twice_until_they_are_added() -> None:
    name = "gradients, one part of n"
    part = 2 * PARAMETERS // 4
    once, twice = (most(formed(zero=2, grad_accum=n, optimizer="sgd"), name) for n in (1, 2))
    assert once == twice == 2 * part  # the step's copy is as large
    cpu = [elsewhere(formed(zero=2, grad_accum=n, offload=["optimizer"]), "cpu")[name] for n in (1, 2)]
    assert cpu == [part, 2 * part]


def test_the_optimizer_in_cpu_memory() -> None:
    part = PARAMETERS // 4
    t = formed(zero=3, offload=["optimizer"])
    assert elsewhere(t, "cpu") == {
        "master weights in fp32, one part of n": 4 * part,
        "gradients in fp32, for the optimizer on CPU": 4 * part,
        "gradients, one part of n": 2 * part,
        "optimizer states": 8 * part + 4,
    }
    assert not any(tag.category == "optimizer" for tag in t.tags)
    assert t.fullest_bytes() < formed(zero=3).fullest_bytes() - 14 * part
    assert t.optimizer_bytes == 12 * part + 4


def test_everything_on_a_drive() -> None:
    part = PARAMETERS // 4
    t = formed(zero=3, offload=["optimizer=nvme", "params=nvme"])
    drive = elsewhere(t, "nvme")
    assert drive["parameters, one part of n"] == 2 * part
    assert drive["master weights in fp32, one part of n"] == 4 * part
    # Four buffers of the part in fp32, five of 1e8 elements for parameters.
    assert elsewhere(t, "cpu")["pinned buffers for NVMe"] == 4 * 4 * part + 5 * 10**8 * 2
    assert sum(t.standing.bytes_by_tag.values()) == 0


def test_fsdp_in_cpu_memory() -> None:
    part = PARAMETERS // 4
    t = formed(fsdp="full_shard", offload=["params"])
    assert elsewhere(t, "cpu") == {
        "parameters, one part of n, pinned": 2 * part,
        "gradients, one part of n, pinned": 2 * part,
        "optimizer states": 4 * part + 4 * (3 + 9 * 22),
    }
    assert sum(t.standing.bytes_by_tag.values()) == 0
    assert not any(tag.category == "optimizer" for tag in t.tags)
    assert t.fullest_bytes() <= formed(fsdp="full_shard").fullest_bytes() - 6 * part  # no weights, no states


def test_inputs_of_layers_in_cpu_memory() -> None:
    options = {"gradient_checkpointing": True, "ctx": 2048, "gpus": 1, "optimizer": "sgd"}
    here, there = formed(**options), formed(offload=["activations"], **options)
    inputs = 22 * 2048 * 2048 * 2
    assert elsewhere(there, "cpu") == {"inputs of layers": inputs}
    saved = "hidden states (saved activations)"
    before = most(here, saved, "embeddings (saved activations)")
    assert before - most(there, saved, "embeddings (saved activations)") >= inputs - 2 * 2048 * 2048 * 2
    assert here.fullest_bytes() > there.fullest_bytes()


def test_what_deepspeed_does_otherwise_is_refused() -> None:
    for optimizer in ("muon", "galore_adamw"):
        with pytest.raises(HfvramError, match="with --zero has no formula: valid are adamw_torch_fused"):
            formed(zero=2, optimizer=optimizer)
    with pytest.raises(
        HfvramError, match="with --zero --offload optimizer has no formula: valid are adamw_torch_fused"
    ):
        formed(zero=2, optimizer="adamw_8bit", offload=["optimizer"])


def test_layers_that_are_left_out_count() -> None:
    """Of 22 layers five are written: the replay of all of them must hold their parts."""
    deep = LLAMA | {"num_hidden_layers": 44}
    request = Request.from_dict({"mode": "train", "ctx": 64, "dtype": "bf16", "quant": "none", "gpus": 4, "zero": 3})
    written, whole = (timeline(infer(deep), request, whole=w) for w in (False, True))
    assert written.elsewhere == whole.elsewhere
    assert replay(written).allocated_bytes == replay(whole).allocated_bytes


def test_the_reduce_bucket_is_as_large_as_the_configuration_says() -> None:
    """2 B an element: DeepSpeed's 5e8, hidden² = 2048² under `auto`, or a number."""
    assert most(formed(zero=2), "DeepSpeed's reduce bucket") == 2 * BUCKET
    assert most(formed(zero=2, zero_bucket="auto"), "DeepSpeed's reduce bucket") == 2 * 2048 * 2048
    assert most(formed(zero=3, zero_bucket="2e8"), "DeepSpeed's reduce bucket") == 2 * 200_000_000
    for wrong in ("much", "-1", "1e13", "nan"):
        with pytest.raises(HfvramError, match="--zero-bucket"):
            formed(zero=2, zero_bucket=wrong)


def test_auto_keeps_small_parameters_whole() -> None:
    """Up to 10·h = 20,480 elements: the norms of 22 layers and the last one, 45 of 2,048, as up to 1e5 by default."""
    for asked in (None, "auto"):
        assert standing(formed(zero=3, zero_bucket=asked))["small parameters that stay whole"] == 45 * 2048 * 2
