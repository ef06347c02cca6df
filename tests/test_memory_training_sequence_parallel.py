"""Sequence parallelism by formula: what ranks keep by hand, and event by event against transformers' styles."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.formula import shares
from hfvram.memory.timeline import Timeline
from hfvram.model.infer import infer
from hfvram.request import Request
from tests.test_memory_tensor_parallel import AUTOCAST, EXACT, IN_ORDER, MORE, formed
from tests.test_memory_training_train import LLAMA, MODELS, live, sequence

ROWS, HIDDEN = 64, 64  # batch 2, 32 tokens


def kept(config: dict[str, Any], **options: Any) -> dict[str, int]:
    found = live(formed(config, 2, batch=2, **options), "backward")
    return {name.removesuffix(" (saved activations)"): n for name, n in found.items()}


def test_what_a_llama_keeps() -> None:
    """Norms, their outputs and the residual of half the sequence; each block and the head gather a whole one."""
    whole, part = kept(LLAMA), kept(LLAMA, sp=True)
    norms = 2 * 2 + 1
    assert whole["normalization in fp32"] == 2 * part["normalization in fp32"] == norms * ROWS * HIDDEN * 4
    # Without it a norm's output is kept twice: cast back, and weighted for the products, which now are given what is
    # gathered.
    assert whole["normalization, output"] == norms * 2 * ROWS * HIDDEN * 2
    assert part["normalization, output"] == norms * ROWS // 2 * HIDDEN * 2
    assert part["sequence parallel, gathered from ranks"] == norms * ROWS * HIDDEN * 2
    for name in ("feed-forward, product", "attention output", "keys and values", "log-probabilities"):
        assert part[name] == whole[name]


def test_checkpoints_are_of_a_part() -> None:
    whole, part = (kept(LLAMA, sp=sp, gradient_checkpointing=True) for sp in (False, True))
    inputs = "hidden states"  # of the last layer; the first one's are the embeddings
    assert whole[inputs] == 2 * part[inputs] == ROWS * HIDDEN * 2


def test_megatron_keeps_parts_and_gathers_again() -> None:
    """GPT-2 has no plan: norms' outputs are kept as parts, and one buffer holds what is gathered."""
    whole, part = kept(MODELS["gpt2"]), kept(MODELS["gpt2"], sp=True)
    assert part["sequence parallel, gathered from ranks"] == ROWS * HIDDEN * 2
    assert part["normalization, output"] < whole["normalization, output"] / 1.9
    dropouts = "dropout before the residual"
    assert part.get(dropouts, 0) <= whole.get(dropouts, 0)
    for name in ("attention output", "logits", "feed-forward, gate and up"):
        assert part[name] == whole[name]
    assert sum(part.values()) < sum(whole.values())


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "bloom"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_without_a_plan_less_is_kept(name: str, options: dict[str, Any]) -> None:
    if name == "gpt_bigcode":
        options = options | {"attention": "eager"}
    config = MODELS[name] | ({"multi_query": False} if name == "gpt_bigcode" else {})
    try:
        peaks = [formed(config, 2, ctx=128, batch=8, sp=sp, **options).fullest_bytes() for sp in (False, True)]
    except HfvramError as error:
        pytest.skip(error.message)
    assert peaks[1] < peaks[0]


def test_stages_send_parts() -> None:
    asked = {"mode": "train", "ctx": 32, "batch": 2, "dtype": "bf16", "quant": "none", "pp": 2, "tp": 2, "sp": True}
    _, last = shares(infer(LLAMA), Request.from_dict(asked | {"grad_accum": 2}))
    received = [n for n, tag in zip(last.timeline.sizes, last.timeline.tags, strict=True) if "stage before" in tag.name]
    assert set(received) == {ROWS // 2 * HIDDEN * 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ctx": 31}, "--sp: --ctx 31 is not divisible by --tp 2: valid are 30 and 32"),
        ({"ctx": 1}, "valid are 2"),
        ({"tp": 1}, "valid is --tp 2 and more"),
    ],
)
def test_what_cannot_be_split(options: dict[str, Any], words: str) -> None:
    asked = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "tp": 2, "sp": True} | options
    with pytest.raises(HfvramError) as caught:
        shares(infer(LLAMA), Request.from_dict(asked))
    assert (caught.value.kind, words in caught.value.message) == ("usage", True)


SCALED = ("gemma", "gemma2", "gemma3_text")
"""Types whose embeddings are scaled by the embedding's own code, which comes before the sequence is split."""
CASES = [(n, {"batch": 2}) for n in EXACT if n not in SCALED]
CASES += [(n, {"gradient_checkpointing": True}) for n in EXACT if n not in (*MORE, *SCALED)]
CASES += [(n, {"grad_accum": 2}) for n in ("llama", "qwen3", "phi3")]


def exact(config: dict[str, Any], **options: Any) -> Timeline:
    from hfvram.memory.exact.simulate import simulate

    asked = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "simulate", "tp": 2, "gpus": 2}
    return simulate(config, None, Request.from_dict(asked | {"sp": True} | options))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_as_transformers_own_code(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    run, formula = exact(EXACT[name], **options), formed(EXACT[name], 2, sp=True, **options)
    if name in IN_ORDER and name not in ("gpt_neox", "olmo2", "olmo3"):
        assert sequence(formula) == sequence(run)
    assert sorted(sequence(formula)) == sorted(sequence(run))
    late = 8192 if name == "qwen3" else 256  # one gradient of 64 tokens
    assert formula.fullest_bytes() == pytest.approx(run.fullest_bytes(), abs=late)
    for fact in ("gradients_bytes", "optimizer_bytes"):
        assert getattr(formula, fact) == getattr(run, fact)


WIDE = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192, "max_position_embeddings": 2048}
PEAKS: list[dict[str, Any]] = [
    {"attention": "eager", "gradient_checkpointing": True},
    {"gpus": 4, "fsdp": "full_shard"},
    AUTOCAST,
    AUTOCAST | {"gradient_checkpointing": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "phi3", "gemma2", "starcoder2"])
@pytest.mark.parametrize("options", PEAKS, ids=str)
def test_peaks_as_transformers_own_code(name: str, options: dict[str, Any]) -> None:
    """FSDP sums norms' gradients over the ranks of `--tp`, and autocast casts in another order: not in a peak."""
    pytest.importorskip("torch")
    config = EXACT[name] | WIDE
    found = formed(config, 2, sp=True, **{"ctx": 1024} | options)
    run = exact(config, **{"ctx": 1024} | options)
    assert found.fullest_bytes() == pytest.approx(run.fullest_bytes(), abs=1024)
