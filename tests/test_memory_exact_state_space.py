"""Fused state-space kernels: what they allocate, by hand, and what they leave as it was."""

from typing import Any

import pytest

from hfvram.request import Request

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact.run import Run  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402
from hfvram.memory.exact.state_space import TUNING_BYTES, kernels  # noqa: E402

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


def empty(*shape: int, dtype: Any = BF16) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def allocated(name: str, *args: Any, **options: Any) -> list[int]:
    run = Run()
    with run.tracker, torch.no_grad():
        kernels(run, gradients=False)[name](*args, **options)
    return [n for n in run.timeline.sizes if n]


def test_selective_scan() -> None:
    b, d, s, n = 2, 64, 3000, 16
    wide = b * d * s * 2
    x, a, narrow = empty(b, d, s), empty(d, n, dtype=torch.float32), empty(b, n, s)
    found = allocated("selective_scan_fn", x, x, a, narrow, narrow, z=x, return_last_state=True)
    assert found == [wide, b * d * 2 * 2 * n * 4, wide]  # output, states of two chunks in fp32, gated output


def test_scan_copies_what_is_transposed() -> None:
    b, d, s, n = 1, 64, 128, 16
    x, a, narrow = empty(b, s, d).transpose(1, 2), empty(d, n, dtype=torch.float32), empty(b, n, s)
    assert allocated("selective_scan_fn", x, empty(b, d, s), a, narrow, narrow)[0] == b * d * s * 2


def test_the_delta_rules_kernels_are_tuned_each_at_its_first_launch() -> None:
    """The buffer of the last one stands beside all that the others made."""
    b, s, h, d = 1, 128, 4, 32
    q, gate = empty(b, s, h, d), empty(b, s, h)
    run = Run()
    rule = kernels(run, gradients=False)["chunk_gated_delta_rule"]
    with run.tracker, torch.no_grad():
        out = rule(q, q, q, g=gate, beta=gate, output_final_state=True)
    sizes = run.timeline.sizes
    assert sizes.count(TUNING_BYTES) == 5
    last = len(sizes) - 1 - sizes[::-1].index(TUNING_BYTES)
    done = run.timeline.events[: run.timeline.events.index(last)]
    live = [sizes[e] for e in done if e >= 0 and ~e not in done]
    wide, states = b * s * h * d * 2, 2 * h * d * d * 2
    # q, k normed, sums, inverse, w, u, states of two chunks, last state, corrected values, output
    assert live == [wide, wide, b * s * h * 4, b * s * h * 64 * 2, wide, wide, states, h * d * d * 4, wide, wide]
    del out


def test_a_trial_of_inputs_tunes_nothing() -> None:
    """What a multimodal model is given is tried first: the autotuner's buffer belongs to the pass that counts."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "vocab_size": 256,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": vision}
    asked = {"mode": "inference", "ctx": 96, "new_tokens": 4, "dtype": "bf16", "attention": "sdpa", "phase": "generate"}
    timeline = simulate(config, "Qwen3_5ForConditionalGeneration", Request.from_dict(asked | {"kernels": "fused"}))
    tuned = [i for i, nbytes in enumerate(timeline.sizes) if nbytes == TUNING_BYTES]
    assert len(tuned) == 5
    assert {timeline.phase_at(timeline.events.index(i) + 1) for i in tuned} == {"prefill"}


def test_chunked_scan_tunes_its_five_kernels_once() -> None:
    b, s, h, p, n, q = 1, 512, 4, 16, 8, 256
    x, dt, a, bc = empty(b, s, h, p), empty(b, s, h), empty(h, dtype=torch.float32), empty(b, s, 1, n)
    run = Run()
    scan = kernels(run, gradients=False)["mamba_chunk_scan_combined"]
    with run.tracker, torch.no_grad():
        scan(x, dt, a, bc, bc, q)
        first = list(run.timeline.sizes)
        scan(x, dt, a, bc, bc, q)
    assert first.count(TUNING_BYTES) == run.timeline.sizes.count(TUNING_BYTES) == 5
    decays, states = b * h * s * 4, b * 2 * h * p * n
    products, out = b * 2 * q * q * 4, b * s * h * p * 2
    mine = [size for size in first if size != TUNING_BYTES]
    assert mine == [decays, decays, states * 4, states * 2, states // 2 * 4, products, out]


def test_convolution_is_its_output_alone() -> None:
    x, weight = empty(1, 64, 128), empty(64, 4)
    assert allocated("causal_conv1d_fn", x, weight, None, activation="silu") == [64 * 128 * 2]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_gradients_flow_through_the_kernels(kind: str) -> None:
    config = {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 16}
    config |= {"expand": 2, "head_dim": 16, "num_heads": 8, "n_groups": 1} if kind == "mamba2" else {}
    timeline = simulate(config, None, Request(mode="train", ctx=64, dtype="bf16", quant="none"))
    assert {name for _, name in timeline.marks} >= {"forward", "backward", "optimizer step"}


def test_the_fallback_needs_more_and_leaves_the_functions_alone() -> None:
    config = {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128, "state_size": 16}
    config |= {"expand": 2, "head_dim": 16, "num_heads": 8, "n_groups": 1}
    asked = {"ctx": 2048, "dtype": "bf16", "phase": "generate", "new_tokens": 2, "quant": "none"}

    def largest(which: str) -> int:
        timeline = simulate(config, None, Request.from_dict(asked | {"kernels": which}))
        return max(n for n in timeline.sizes if n not in (TUNING_BYTES, 32 << 20))

    assert largest("fallback") > 2 * largest("fused")
    assert largest("fallback") == largest("fallback")
