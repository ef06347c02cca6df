"""Inference by formula against the models' own code, on small models of types that hold more than their layers need."""

from typing import Any

import pytest

from hfvram.answer.resolve import resolve
from hfvram.memory import formula
from hfvram.memory.allocator import replay
from hfvram.model.infer import infer
from hfvram.request import Request

BLOOM = {"model_type": "bloom", "hidden_size": 256, "n_head": 8, "n_layer": 4, "vocab_size": 1000}
MPT = {"model_type": "mpt", "d_model": 256, "n_heads": 8, "n_layers": 4, "vocab_size": 1000, "max_seq_len": 2048}
GPTJ = {"model_type": "gptj", "n_embd": 256, "n_head": 8, "n_layer": 4, "rotary_dim": 16, "vocab_size": 1000}
CODEGEN = GPTJ | {"model_type": "codegen"}
GPT_NEO = {"model_type": "gpt_neo", "hidden_size": 256, "num_layers": 4, "vocab_size": 1000, "num_heads": 8}
GPT_NEO |= {"attention_types": [[["global", "local"], 2]]}

T5 = {"d_model": 256, "num_heads": 8, "d_kv": 32, "d_ff": 512, "num_layers": 4, "vocab_size": 1000}
T5 |= {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
UMT5 = T5 | {"model_type": "umt5"}


def peaks(config: dict[str, Any], **asked: Any) -> tuple[int, int]:
    """Bytes live at the peak: by formula, and by the model's own code."""
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    found = []
    architecture = infer(config)
    for method in ("formula", "simulate"):
        request, _ = resolve(architecture, Request(mode="inference", method=method, **asked))  # type: ignore[arg-type]
        if method == "formula":
            timeline = formula.timeline(architecture, request)
        else:
            timeline = simulate(config, architecture.class_name, request)
        found.append(replay(timeline).allocated_bytes)
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("config", [BLOOM, MPT, GPTJ, CODEGEN, GPT_NEO], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("asked", [{"batch": 2, "ctx": 700}, {"batch": 1, "ctx": 1500, "dtype": "bf16"}], ids=str)
def test_weights_of_attention_that_are_held_on(config: dict[str, Any], asked: dict[str, Any]) -> None:
    """Their loops hold what the last layer returned, eager attention's weights too, until the next one returns."""
    formed, exact = peaks(config, **asked)
    assert formed == pytest.approx(exact, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("config", [T5, UMT5], ids=lambda c: c["model_type"])
@pytest.mark.parametrize(
    "asked", [{}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"dtype": "fp16", "quant": "nf4"}], ids=str
)
def test_t5_keeps_its_last_product_in_fp32(config: dict[str, Any], asked: dict[str, Any]) -> None:
    """In fp16 `from_pretrained` leaves `wo` in fp32, and the residual becomes fp32 by it; the bias is padded always."""
    formed, exact = peaks(config, ctx=1000, **asked)
    assert formed == pytest.approx(exact, rel=0.005)


VIT = {"model_type": "vit", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 96}
YOLOS = VIT | {"model_type": "yolos", "image_size": [96, 128], "num_detection_tokens": 10}
VISION = VIT | {"model_type": "clip_vision_model", "patch_size": 8}
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 500}
CLIP = {"model_type": "clip", "text_config": TEXT, "vision_config": VISION}
SIGLIP = {"model_type": "siglip_vision_model"} | {k: v for k, v in VISION.items() if k != "model_type"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [VIT, YOLOS, VISION, CLIP, SIGLIP], ids=lambda c: c["model_type"])
def test_an_image_is_as_many_tokens_as_its_patches(config: dict[str, Any]) -> None:
    """Whatever --ctx says; both engines are given the image of the configuration."""
    formed, exact = peaks(config, batch=3, ctx=70)
    assert formed == pytest.approx(exact, rel=0.002)


def test_ctx_says_nothing_of_an_image() -> None:
    asked = [resolve(infer(VIT), Request(mode="inference", ctx=ctx)) for ctx in (70, 700)]
    assert all("an image is 37 tokens" in warnings[0] for _, warnings in asked)
    peaks_of = {replay(formula.timeline(infer(VIT), request)).allocated_bytes for request, _ in asked}
    assert len(peaks_of) == 1
