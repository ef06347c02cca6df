"""Estimates made by hand, for the renderers' tests: Mixtral-8x7B, Mamba-130m; and a small real model."""

import json
from dataclasses import replace
from pathlib import Path

from hfvram.answer.estimate import Estimate, Fit, Interval, Item, ModelFacts, Recommended, RuleOfThumb, Way
from hfvram.request import Request
from hfvram.units import GiB, MiB

PARAMETERS = 46_702_792_704
CACHE = 2 * 32 * 8 * 128 * 2 * 8191
SPARE = 32 * MiB

MIXTRAL = ModelFacts(
    id="mistralai/Mixtral-8x7B-v0.1",
    commit="fc7ac94680e38d7348cfa806e51218e6273104b0",
    source="hub",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    parameters=PARAMETERS,
    active_parameters=12_879_925_248,
    trainable_parameters=0,
    parameters_from="headers",
    dtype="bf16",
    layers=32,
    hidden_size=4096,
    attention_heads=32,
    kv_heads=8,
    head_dim=128,
    experts=8,
    experts_per_token=2,
    state_size=None,
    layer_kinds={"full_attention": 32, "moe": 32},
)

MAMBA = replace(
    MIXTRAL,
    id="state-spaces/mamba-130m-hf",
    commit=None,
    source="catalogue",
    architecture="MambaForCausalLM",
    model_type="mamba",
    parameters=129_135_360,
    active_parameters=129_135_360,
    parameters_from="catalogue",
    dtype="fp32",
    layers=24,
    hidden_size=768,
    attention_heads=None,
    kv_heads=None,
    head_dim=None,
    experts=None,
    experts_per_token=None,
    state_size=16,
    layer_kinds={"mamba": 24},
)


def item(name: str, category: str, size: int, formula: str, certainty: str = "derived") -> Item:
    source = "transformers 5.17, modeling_mixtral.py"
    return Item(name=name, category=category, bytes=size, formula=formula, source=source, certainty=certainty)  # type: ignore[arg-type]


def mixtral() -> Estimate:
    items = (
        item("weights", "weights", 2 * PARAMETERS, "46,702,792,704 parameters × 2 B (bf16)", "exact"),
        item("rotary frequencies", "buffers", 512, "64 × 4 B, and a copy"),
        item(
            "keys and values",
            "cache",
            CACHE,
            "2·L·a_kv·d·(ctx − 1)·b × 2 B = 2 × 32 × 8 × 128 × 8,191 × 1 × 2 B",
            "exact",
        ),
        item("experts' hidden states", "activations", 448 * MiB, "b·s·k·f × 2 B = 1 × 8,184 × 2 × 14,336 × 2 B"),
        item("logits", "activations", 32_000 * 4, "b·V × 4 B"),
        item("cuBLAS workspace", "workspace", SPARE, "32 MiB a handle and stream", "calibrated"),
        item("rounding", "rounding", 1536, "blocks of 512 B"),
    )
    peak = sum(i.bytes for i in items)
    return Estimate(
        model=MIXTRAL,
        request=Request(ctx=8192, new_tokens=8, phase="generate", method="formula"),
        method="formula",
        versions={"hfvram": "0.1.0"},
        items=items,
        peak_phase="prefill",
        weights_bytes=2 * PARAMETERS,
        cache_bytes=CACHE,
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=448 * MiB,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + 600 * MiB,
        device_bytes=peak + 1400 * MiB,
        interval=Interval(low_bytes=89 * GiB, high_bytes=91 * GiB, basis="9 of 10 of the measured MoE cases"),
        guide=RuleOfThumb(bytes=2 * PARAMETERS + 4 * GiB, formula="2P + 2·b·s·layers·d_head·n_head × 2 B"),
        warnings=("mistralai/Mixtral-8x7B taken as mistralai/Mixtral-8x7B-v0.1",),
    )


def too_much() -> Estimate:
    """Mixtral on an H100, where it does not fit."""
    e = mixtral()
    capacity = 80 * GiB
    ways = (Way(change="--quant int8", device_bytes=46 * GiB), Way(change="--quant nf4", device_bytes=27 * GiB))
    fit = Fit(
        gpu="H100 SXM 80GB",
        capacity_bytes=capacity,
        fits=False,
        headroom_bytes=capacity - e.device_bytes,
        max_ctx=0,
        max_batch=0,
        ways=ways,
    )
    recommended = (Recommended(gpu="H100 NVL 94GB", capacity_bytes=93 * GiB),)
    return replace(e, request=e.request.with_(gpu="H100"), fit=fit, recommended=recommended)


def roomy() -> Estimate:
    """Mixtral on an H200, where it fits."""
    e, capacity = mixtral(), 139 * GiB
    headroom = capacity - e.device_bytes
    fit = Fit(
        gpu="H200", capacity_bytes=capacity, fits=True, headroom_bytes=headroom, max_ctx=32768, max_batch=31, ways=()
    )
    return replace(e, request=e.request.with_(gpu="H200", batch=2, quant="none", padding=True), fit=fit)


def mamba() -> Estimate:
    """A model without attention, source catalogue, with more items than a table should have."""
    items = tuple(
        item(f"part {i:02}", "activations", (20 - i) * 10 * MiB if i < 16 else 512, f"{i} parts") for i in range(20)
    )
    peak = sum(i.bytes for i in items)
    return replace(
        mixtral(),
        model=MAMBA,
        items=items,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak,
        device_bytes=peak + 527 * MiB,
        warnings=(),
    )


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# embedding and head 2 · 1000 · 256; a layer: q, o 256² each, k, v 128 · 256 each, three of 256 · 688, two norms; a norm
PARAMETERS_LLAMA = 2 * 1000 * 256 + 4 * (2 * 256**2 + 2 * 128 * 256 + 3 * 256 * 688 + 2 * 256) + 256


def llama_folder(parent: Path) -> str:
    """A folder that holds the configuration of a small Llama."""
    folder = parent / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)
