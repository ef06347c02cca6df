"""Formulas of papers, against the figures that were published with them."""

import pytest

from hfvram.memory.theory import (
    ends_activation_bytes,
    layer_activation_bytes,
    megatron_activation_bytes,
    megatron_parameters,
    megatron_state_bytes,
    stage_activation_bytes,
)


@pytest.mark.parametrize(
    ("parameters", "ranks", "printed"),
    [
        (megatron_parameters(48, 1600, 25, 6400, 50304), None, 26_699.47),
        (megatron_parameters(32, 4096, 32, 14336, 128256, kv_heads=8, gated=True, untied=True), 8, 57_438.81),
    ],
    ids=["gpt2-xl", "llama-3-8b"],
)
def test_megatron_prints_these(parameters: float, ranks: int | None, printed: float) -> None:
    assert round(megatron_state_bytes(parameters, ranks) / 2**20, 2) == printed


def test_megatrons_activations_are_the_papers_with_sequence_parallelism_and_selective_recomputation() -> None:
    """Where the feed-forward is four times as wide; Megatron adds the 8 bytes of a token's id."""
    s, b, h, layers, vocab, t = 2048, 4, 6144, 48, 51200, 8
    one = layer_activation_bytes(s, b, h, 64, t, sequence_parallel=True, recomputed="selective")
    paper = stage_activation_bytes(one, layers) + ends_activation_bytes(s, b, h, vocab, t)
    assert megatron_activation_bytes(layers, h, 4 * h, vocab, s, b, t=t) == paper + 8 * s * b / t


def test_ranks_of_a_pipeline_share_layers_not_activations() -> None:
    one = layer_activation_bytes(2048, 1, 20480, 128, 8, sequence_parallel=True, recomputed="full")
    assert one == 2 * 2048 * 20480
    assert stage_activation_bytes(one, 105, p=35) == stage_activation_bytes(one, 105)
    with_head = megatron_activation_bytes(2, 1024, 4096, 32000, 2048, 1)
    assert with_head - megatron_activation_bytes(2, 1024, 4096, 32000, 2048, 1, p=2) == (
        4 * 2048 * (1024 + 32000) - 2048 * (8 + 1024)
    )
