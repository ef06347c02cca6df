"""flash-attn through transformers' own code: what a layer keeps for its gradient, and what is refused."""

from typing import Any

import pytest

pytest.importorskip("torch")

from hfvram.errors import HfvramError
from hfvram.memory.exact.simulate import simulate
from hfvram.memory.formula import timeline as by_formula
from hfvram.memory.timeline import Timeline
from hfvram.model.infer import infer
from hfvram.request import Request

pytestmark = pytest.mark.slow

LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 320}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "bfloat16"}


def ran(config: dict[str, Any] = LLAMA, **options: Any) -> Timeline:
    asked = {"ctx": 256, "new_tokens": 4, "dtype": "bf16", "quant": "none", "phase": "generate"}
    asked |= {"attention": "flash_attention_2"} | options
    return simulate(config, None, Request.from_dict({k: v for k, v in asked.items() if v is not None}))


@pytest.mark.parametrize("phase", ["generate", "prefill"])
def test_inference_is_what_the_formula_says(phase: str) -> None:
    options = {"phase": phase, "new_tokens": 4 if phase == "generate" else None}
    asked = {"ctx": 256, "dtype": "bf16", "quant": "none", "attention": "flash_attention_2"} | options
    request = Request.from_dict({k: v for k, v in asked.items() if v is not None})
    formula = by_formula(infer(LLAMA), request)
    exact = ran(**options)
    assert exact.fullest_bytes() == pytest.approx(formula.fullest_bytes(), rel=0.002)
    assert exact.cache_bytes == formula.cache_bytes


def test_a_layer_keeps_no_scores() -> None:
    """Against eager, which keeps b·a·s·s scores in fp32 and again as probabilities in bf16, in each of two layers."""
    saved = {}
    for attention in ("flash_attention_2", "eager"):
        timeline = ran(mode="train", phase=None, new_tokens=None, batch=2, attention=attention)
        backward = next(at for at, name in timeline.marks if name == "backward")
        saved[attention] = [timeline.sizes[h] for h in timeline.live(backward)]
    square = 2 * 4 * 256 * 256
    assert square * 2 in saved["eager"]
    assert square * 2 not in saved["flash_attention_2"]
    assert saved["flash_attention_2"].count(2 * 4 * 256 * 4) == 2  # the log-sum-exp of each row, in fp32


def test_padding_takes_the_sequences_apart() -> None:
    assert ran(padding=True, batch=2).fullest_bytes() > ran(batch=2).fullest_bytes()


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (LLAMA, {"dtype": "fp32"}, "fp16 and bf16"),
        ({"model_type": "biogpt", "num_hidden_layers": 1}, {"attention": "flash_attention_2"}, None),
        ({"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 64}, {}, "valid are sdpa and eager"),
    ],
)
def test_what_it_can_not_run_is_refused(config: dict[str, Any], options: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert ran(config, **options).sizes
        return
    with pytest.raises(HfvramError, match=said) as caught:
        ran(config, **options)
    assert caught.value.kind == "usage"
