"""One tensor parallel rank's part: by hand, its parameters, and event by event against transformers' own code."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.memory.formula import shares
from hfvram.memory.tensor_parallel import part_of
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request
from tests.test_memory_training_decoders import HEADS
from tests.test_memory_training_decoders import MODELS as DECODERS
from tests.test_memory_training_moe import MODELS as MIXTURES
from tests.test_memory_training_train import GROUPED, LLAMA, MODELS, SMALL, sequence

TIED = SMALL | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True}


def formed(config: dict[str, Any], tp: int, **options: Any) -> Timeline:
    asked = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "tp": tp} | options
    return timeline(part_of(infer(config), tp), Request.from_dict(asked), on_meta=True)


def test_a_llama_on_two_ranks() -> None:
    """h 64, f 96, 4 heads and 2 KV heads of 16, V 256, 2 layers: everything but norms and the embedding is halved."""
    whole, part = infer(LLAMA), part_of(infer(LLAMA), 2)
    attention = 64 * 32 * 2 + 64 * 16 * 2  # two heads of queries and their output, one of keys and values
    layer = attention + 3 * 64 * 48 + 2 * 64
    assert part.parameters == 256 * 64 + 2 * layer + 64 + 128 * 64
    assert whole.parameters == 2 * part.parameters - 256 * 64 - 2 * 2 * 64 - 64
    assert part.text.layers[0] is part.text.layers[1]  # so that repeated layers are written once
    found = part.attention
    assert found is not None
    assert (found.heads, found.kv_heads) == (2, 1)


def test_a_tied_head_splits_its_table() -> None:
    assert part_of(infer(TIED), 2).text.before[0].shape == (128, 64)
    assert part_of(infer(LLAMA), 2).text.before[0].shape == (256, 64)


def test_without_a_plan_the_vocabulary_is_split() -> None:
    part = part_of(infer(MODELS["gpt2"]), 2)
    (embedding, *_), attention = part.text.before, part.text.layers[0].mixers[0]
    assert embedding.shape == (128, 64)
    assert part.vocab_size == 128  # logits and loss of a part alone
    shapes = {p.name: p.shape for p in attention.params}
    assert shapes["attn.c_attn.weight"] == (64, 96)  # a `Conv1D` lies as (inputs, outputs)
    assert shapes["attn.c_proj.weight"] == (32, 64)
    assert shapes["attn.c_attn.bias"] == (96,)
    assert shapes["attn.c_proj.bias"] == (64,)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt_bigcode"])
def test_parts_add_up_to_the_model(name: str) -> None:
    """What is split is there once over all ranks, the rest on each of them."""
    whole, part = infer(MODELS[name]), part_of(infer(MODELS[name]), 2)
    for one, own in zip(whole.all_params, part.all_params, strict=True):
        assert one.name == own.name
        assert own.numel * (2 if own.shape != one.shape else 1) == one.numel
        assert (own.shape != one.shape) <= (own.split is not None)
    split = sum(p.numel for p in part.all_params if p.split)
    assert split * 2 > 0.9 * (whole.parameters - 256 * 64)


@given(st.sampled_from(sorted(MODELS)), st.sampled_from([1, 2, 4]))
def test_more_ranks_never_hold_more(name: str, tp: int) -> None:
    try:
        sizes = [part_of(infer(MODELS[name]), n).parameters for n in (tp, 2 * tp)]
    except HfvramError:
        return
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("config", "tp", "message"),
    [
        (LLAMA, 3, "--tp 3 does not divide 2 and 4 heads: valid are 1, 2"),
        (LLAMA, 4, "--tp 4 does not divide 2 and 4 heads: valid are 1, 2"),
        (LLAMA | {"intermediate_size": 97}, 2, "--tp 2 does not divide the width 97: valid are 1, 97"),
        (LLAMA | {"vocab_size": 257}, 2, "--tp 2 does not divide the vocabulary of 257 tokens"),
    ],
)
def test_what_can_not_be_split_says_what_can(config: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(HfvramError) as caught:
        part_of(infer(config), tp)
    assert caught.value.kind == "usage"
    assert message in caught.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "lora", "sp": True},
        {"mode": "lora", "fsdp": "full_shard", "gpus": 4},
        {"mode": "lora", "gpus": 4},
        {"mode": "qlora", "quant": "nf4"},
        {"quant": "nf4", "mode": "inference"},
        {"mode": "train", "zero": 1, "gpus": 4},
        {"mode": "train", "gpus": 4},
    ],
    ids=str,
)
def test_no_formula_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(HfvramError, match="--tp"):
        shares(infer(LLAMA), Request.from_dict({"tp": 2, "ctx": 32, "dtype": "bf16", "quant": "none"} | options))


@pytest.mark.parametrize("name", ["falcon", "bert", "granitemoe"])
def test_a_type_that_was_not_compared_is_said(name: str) -> None:
    with pytest.raises(HfvramError, match=f"--tp has no formula for model type {name} yet: --method simulate"):
        part_of(infer(GROUPED | {"model_type": name}), 2)


def test_the_answer_is_each_gpus() -> None:
    (all_alike,) = shares(infer(LLAMA), Request(mode="train", tp=2, ctx=32, dtype="bf16", quant="none"))
    assert (all_alike.name, all_alike.gpus) == ("all", 2)
    assert all_alike.timeline.trainable_parameters == infer(LLAMA).parameters


MORE = ("cohere", "cohere2", "ernie4_5", "exaone4", "gemma3_text", "glm", "glm4", "helium", "ministral")
MORE += ("ministral3", "nanochat", "olmo", "olmo3", "phi", "smollm3")
EXACT = {n: c for n, c in MODELS.items() if n not in ("gpt2", "gpt_bigcode", "bloom")}
EXACT |= {n: DECODERS[n] | {"model_type": n} for n in MORE}
EXACT |= {n: HEADS | {"model_type": n} for n in ("phi3", "seed_oss", "cwm")}
IN_ORDER = ("llama", "mistral", "qwen2", "granite", "olmo2", "arcee", "gpt_neox", "glm", "glm4", "helium", "ministral")
IN_ORDER += ("ministral3", "nanochat", "olmo", "olmo3", "phi")
"""Types that agree event by event; in the others a gradient is let go some events earlier or later."""

CASES = [(n, {"batch": 2}) for n in EXACT]
CASES += [(n, {"gradient_checkpointing": True, "attention": "eager"}) for n in EXACT if n not in MORE]
CASES += [(n, {"gpus": 4, "fsdp": "full_shard"}) for n in ("llama", "gpt_neox", "qwen3", "phi3")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_as_transformers_own_code(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    asked = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "simulate", "tp": 2, "gpus": 2}
    exact = simulate(EXACT[name], None, Request.from_dict(asked | options))
    formula = formed(EXACT[name], 2, **options)
    if name in IN_ORDER:
        assert sequence(formula) == sequence(exact)
    assert sorted(sequence(formula)) == sorted(sequence(exact))
    assert formula.fullest_bytes() == pytest.approx(exact.fullest_bytes(), abs=256)
    for fact in ("gradients_bytes", "optimizer_bytes"):
        assert getattr(formula, fact) == getattr(exact, fact)


def test_adapters_of_two_ranks() -> None:
    """r 4: A whole and B by its outputs around columns, A by its inputs and B whole around rows; in fp32."""
    (found,) = shares(infer(LLAMA), Request.from_dict({**ADAPTERS, "lora_targets": "all-linear"}))
    columns = 4 * (64 + 32) + 2 * 4 * (64 + 16) + 2 * 4 * (64 + 48)  # q; k and v; gate and up
    rows = 4 * (32 + 64) + 4 * (48 + 64)  # o; down
    assert found.timeline.gradients_bytes == 2 * (columns + rows) * 4
    whole = 4 * (64 + 64) + 2 * 4 * (64 + 32) + 2 * 4 * (64 + 96) + 4 * (64 + 64) + 4 * (96 + 64)
    assert found.timeline.trainable_parameters == 2 * whole


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("olmo2", {}, "PEFT splits no adapter around self_attn.q_proj.weight, which --tp gathers"),
        ("gpt2", {}, "for which transformers has no plan"),
        ("llama", {"lora_targets": "lm_head"}, "PEFT splits no adapter around lm_head.weight"),
    ],
)
def test_adapters_that_are_not_split(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(HfvramError, match=words) as caught:
        shares(infer(MODELS[name]), Request.from_dict(ADAPTERS | options))
    assert caught.value.kind == "usage"


ADAPTERS: dict[str, Any] = {"mode": "lora", "lora_r": 4, "tp": 2, "ctx": 32, "dtype": "bf16", "quant": "none"}
ADAPTED: list[dict[str, Any]] = [{"batch": 2}, {"lora_targets": ["q_proj", "o_proj"], "grad_accum": 2}]
ADAPTED += [{"gradient_checkpointing": True, "lora_dropout": 0.1, "ctx": 128}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama, all heads", "qwen3", "starcoder2", "gemma2", "cohere"])
@pytest.mark.parametrize("options", ADAPTED, ids=str)
def test_adapters_as_pefts_own_code(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from hfvram.memory.exact.simulate import simulate

    asked = Request.from_dict(ADAPTERS | {"method": "simulate", "gpus": 2} | options)
    exact = simulate(EXACT[name], None, asked)
    formula = formed(EXACT[name], 2, mode="lora", lora_r=4, **options)
    assert sorted(sequence(formula)) == sorted(sequence(exact))
    assert formula.fullest_bytes() == pytest.approx(exact.fullest_bytes(), abs=256)
    for fact in ("gradients_bytes", "optimizer_bytes"):
        assert getattr(formula, fact) == getattr(exact, fact)
    (found,) = shares(infer(EXACT[name]), asked.with_(method="formula"))
    assert found.timeline.trainable_parameters == exact.trainable_parameters


def test_a_mixtral_on_two_ranks() -> None:
    """4 experts of h 64 and f 96: each rank has all of them, half as wide, and the whole router."""
    part = part_of(infer(MIXTURES["mixtral"]), 2).text.layers[0].feed_forward
    assert part is not None
    shapes = {p.name: p.shape for p in part.params}
    assert shapes == {
        "mlp.gate.weight": (4, 64),
        "mlp.experts.gate_up_proj": (4, 2 * 48, 64),
        "mlp.experts.down_proj": (4, 64, 48),
    }
    whole = infer(MIXTURES["qwen2_moe"]).text.layers[-1].feed_forward
    assert part_of(infer(MIXTURES["qwen2_moe"]), 2).text.layers[-1].feed_forward == whole  # no plan splits them


OF_EXPERTS = ("mixtral", "mixtral, a loss of balance", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")
SPLIT: list[dict[str, Any]] = [{"batch": 2}, {"gradient_checkpointing": True}, {"gpus": 4, "fsdp": "full_shard"}]
SPLIT += [{"sp": True, "batch": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EXPERTS)
@pytest.mark.parametrize("options", SPLIT, ids=str)
def test_mixtures_as_transformers_own_code(name: str, options: dict[str, Any]) -> None:
    """With parts of the sequence, shared experts' gradients are added up elsewhere."""
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    asked = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "simulate", "tp": 2, "gpus": 2}
    exact = simulate(MIXTURES[name], None, Request.from_dict(asked | options))
    formula = formed(MIXTURES[name], 2, **options)
    if not (options.get("sp") and name in ("qwen2_moe", "glm4_moe")):
        assert sorted(sequence(formula)) == sorted(sequence(exact))
    assert formula.fullest_bytes() == pytest.approx(exact.fullest_bytes(), abs=256)
    for fact in ("gradients_bytes", "optimizer_bytes"):
        assert getattr(formula, fact) == getattr(exact, fact)


LORA: dict[str, Any] = {"mode": "lora", "gradient_checkpointing": True}
AUTOCAST: dict[str, Any] = {"mixed_precision": "bf16", "dtype": "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "starcoder2"])
@pytest.mark.parametrize(
    "options", [AUTOCAST, AUTOCAST | {"gradient_checkpointing": True}, {"grad_accum": 2}, LORA], ids=str
)
def test_peaks_as_transformers_own_code(name: str, options: dict[str, Any]) -> None:
    """Under autocast some casts come in another order; the peak is the same."""
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    wide = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192, "max_position_embeddings": 2048}
    config = MODELS[name] | wide
    asked = {"mode": "train", "ctx": 1024, "dtype": "bf16", "quant": "none", "method": "simulate", "tp": 2, "gpus": 2}
    exact = simulate(config, None, Request.from_dict(asked | options))
    found = formed(config, 2, **{"ctx": 1024} | options)
    assert found.fullest_bytes() == pytest.approx(exact.fullest_bytes(), abs=1024)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama, all heads", "qwen3", "starcoder2", "phi3", "mixtral", "olmoe"])
def test_inference_as_transformers_own_code(name: str) -> None:
    """As near as the formula is on one GPU, which leaves out cuBLASLt's MiB of products with a bias."""
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    wide = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192, "max_position_embeddings": 2048}
    mixtures = {n: MIXTURES[n] for n in ("mixtral", "olmoe")}
    config = (MODELS | mixtures).get(name, GROUPED | {"model_type": "phi3", "pad_token_id": 0}) | wide
    off = []
    for ranks in (1, 2):
        asked = Request(ctx=1024, new_tokens=4, phase="generate", dtype="bf16", quant="none", tp=ranks, gpus=ranks)
        exact = simulate(config, None, asked.with_(method="simulate"))
        ((_, _, formula),) = shares(infer(config), asked)
        assert formula.cache_bytes == exact.cache_bytes
        off.append(exact.fullest_bytes() - formula.fullest_bytes())
    assert off[1] == pytest.approx(off[0], abs=1024)
    assert off[1] < 1 << 21
