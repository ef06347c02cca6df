"""Questions to transformers' continuous batching."""

from typing import Any

import pytest

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.request import Request

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def ask(model: str = LLAMA_8B, **options: Any) -> Estimate:
    return Session().estimate(model, Request.from_dict({"cache": "paged", **options}), offline=True)


def refusal(model: str = LLAMA_8B, **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        ask(model, **options)
    assert caught.value.kind == "usage"
    return caught.value.message


@pytest.mark.parametrize("gpu", [None, "H100"])
def test_an_answer(gpu: str | None) -> None:
    e = ask(requests="64x2048,3x300", gpu=gpu)
    block = 256 * 131_072
    assert e.serving is not None
    assert e.cache_bytes == (64 * 8 + 3 * 2) * block
    assert e.serving.waste_bytes == 3 * 212 * 131_072
    assert e.serving.kv_bytes_per_token == 131_072
    assert sum(i.bytes for i in e.items) == e.peak_allocated_bytes
    assert (e.fit is not None and e.fit.fits) == (gpu is not None)
    assert e.request.quant == "none"
    assert any("not measured" in w for w in e.warnings)


def test_what_does_not_fit_has_ways() -> None:
    e = ask(gpu="RTX 4090", ctx=8192, batch=40)
    assert e.fit is not None
    assert not e.fit.fits
    assert e.fit.max_batch is not None
    assert e.fit.max_batch < 40
    assert any(w.change.startswith("--ctx") for w in e.fit.ways)


def test_what_does_not_go_with_it() -> None:
    assert "--tp is not supported with --cache paged" in refusal(tp=2)
    assert "--mode train" in refusal(mode="train")
    assert "--method simulate" in refusal(method="simulate")
    assert "--attention eager" in refusal(attention="eager")
    assert "valid is bf16" in refusal(kv_dtype="fp8")
    assert "no decoder" in refusal("google-t5/t5-small")
    assert "valid is dynamic" in refusal("deepseek-ai/DeepSeek-V2-Lite")
    with pytest.raises(HfvramError, match="goes with --engine"):
        ask(cache="dynamic", requests="1x10")
