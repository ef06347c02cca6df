"""Context parallelism by formula: what a rank keeps, by hand; which ranks differ; what goes with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfvram import estimate
from hfvram.errors import HfvramError
from hfvram.memory.formula import Share, shares
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request
from tests.test_memory_training_train import GROUPED, LLAMA, MODELS, SMALL, live

ASKED: dict[str, Any] = {"mode": "train", "ctx": 64, "dtype": "bf16", "quant": "none", "cp": 2}


def found(config: dict[str, Any] = LLAMA, **options: Any) -> tuple[Share, ...]:
    return shares(infer(config), Request.from_dict(ASKED | options))


def saved(share: Share) -> dict[str, int]:
    return {name.removesuffix(" (saved activations)"): n for name, n in live(share.timeline, "backward").items()}


def refusal(config: dict[str, Any] = LLAMA, **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        found(config, **options)
    assert caught.value.kind == "usage"
    return caught.value.message


def test_a_rank_keeps_what_half_the_tokens_keep() -> None:
    """With 64 tokens over 2 ranks, all that 32 tokens alone keep, and nothing of the ring."""
    part = saved(found()[1])
    alone = timeline(infer(LLAMA), Request.from_dict(ASKED | {"cp": 1, "ctx": 32}))
    whole = saved(Share("all", 1, alone))
    for inputs in ("token ids", "positions", "shifted labels", "gradients in DDP's buckets"):
        part.pop(inputs, None)
        whole.pop(inputs, None)
    assert part == whole


def test_inputs_keep_their_storages() -> None:
    """Token ids, positions and shifted labels are shortened in place: b·s·8 each stay."""
    part = saved(found(batch=3)[1])
    assert part["token ids"] == part["positions"] == part["shifted labels"] == 3 * 64 * 8


def test_ranks_that_differ() -> None:
    assert [(share.name, share.gpus) for share in found()] == [("cp rank 1", 1), ("cp rank 2", 1)]
    names = [(share.name, share.gpus) for share in found(cp=8, gpus=16, fsdp="full_shard")]
    assert names == [("cp rank 1", 2), ("cp ranks 2 to 7", 12), ("cp rank 8", 2)]


def test_a_mask_where_positions_jump() -> None:
    """All but the last rank: b·(s÷cp)² booleans that ring attention has no use for, with the layers' own inputs."""
    first, last = found(batch=2, gradient_checkpointing=True)
    assert saved(first)["attention mask"] == 2 * 32 * 32
    assert "attention mask" not in saved(last)


def test_weights_are_sharded_over_the_ranks_that_share_a_sequence() -> None:
    """accelerate's `dp_shard_cp`: 2 ranks of 2 sequences make 4 parts, as 4 GPUs of 4 sequences do."""
    shared, _ = found(gpus=4, fsdp="full_shard")
    alone = shares(infer(LLAMA), Request.from_dict(ASKED | {"cp": 1, "gpus": 4, "fsdp": "full_shard"}))
    of = [sum(n for n, tag in s.timeline.standing.tensors if tag.category == "weights") for s in (shared, *alone)]
    assert of[0] == of[1]
    assert shared.timeline.optimizer_bytes == alone[0].timeline.optimizer_bytes
    assert shared.timeline.trainable_parameters == infer(LLAMA).parameters


def test_replicated_ranks_reduce_gradients() -> None:
    """Each parameter once more in DDP's buckets, even with one copy of the model a sequence."""
    part = saved(found()[0])
    assert part["gradients in DDP's buckets"] == 2 * infer(LLAMA).parameters


@pytest.mark.parametrize("cp", [2, 4])
def test_more_ranks_need_less(cp: int) -> None:
    config = MODELS["gpt2"] | {"n_positions": 1024}
    peaks = [max(s.timeline.fullest_bytes() for s in found(config, cp=n, ctx=1024, batch=8)) for n in (cp // 2, cp)]
    assert peaks[1] < peaks[0]


def test_within_tensor_and_sequence_parallelism() -> None:
    """Norms of 64 ÷ 2 ÷ 2 tokens."""
    options: dict[str, Any] = {"tp": 2, "gpus": 4, "fsdp": "full_shard"}
    whole, part = (saved(found(**options, sp=sp)[1])["normalization in fp32"] for sp in (False, True))
    assert whole == 2 * part == (2 * 2 + 1) * 32 * 64 * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ctx": 62}, "--cp 2: --ctx 62 is not divisible by 2·2, pieces alike: valid are 60 and 64"),
        ({"ctx": 36, "tp": 2, "sp": True, "fsdp": "full_shard"}, "2·2·2, pieces alike: valid are 32 and 40"),
        ({"attention": "eager"}, "valid is --attention sdpa"),
        ({"padding": True}, "valid is --no-padding"),
        ({"dtype": "fp32"}, "--cp needs a kernel"),
        ({"tp": 2}, "--tp with more --gpus or --cp trains with --fsdp"),
    ],
    ids=str,
)
def test_what_does_not_go_around(options: dict[str, Any], words: str) -> None:
    assert words in refusal(**options)


def test_models_that_do_not_go_around() -> None:
    assert "see a window" in refusal(GROUPED | {"model_type": "mistral", "sliding_window": 16})
    assert "can't run SDPA" in refusal(MODELS["bloom"])
    assert "carry a state" in refusal({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2})


def test_the_road(tmp_path: Path) -> None:
    config = SMALL | {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    options: dict[str, Any] = {"mode": "train", "dtype": "bf16", "ctx": 1024, "cp": 4, "fsdp": "full_shard"}
    answer = estimate(str(tmp_path), **options)
    assert [r.gpus for r in answer.ranks] == [1, 2, 1]
    assert sum(item.bytes for item in answer.items) == answer.peak_allocated_bytes
    assert any("derived from their code, not measured" in warning for warning in answer.warnings)
    for refused, words in (
        ({"mode": "inference", "fsdp": None}, "keeps no cache to generate from"),
        ({"method": "simulate"}, "--cp 4 has no exact engine"),
        ({"fsdp": None, "zero": 1}, "valid is --fsdp"),
    ):
        with pytest.raises(HfvramError, match=words):
            estimate(str(tmp_path), **options | refused)
