"""What optimizers keep, by hand."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hfvram.answer import supported  # noqa: E402
from hfvram.errors import HfvramError  # noqa: E402
from hfvram.memory.exact.optimizers import OPTIMIZERS, fused_on_meta, optimizer, states  # noqa: E402

pytestmark = pytest.mark.slow

N = 512 * 300
"""Values of the large parameter: over 100,000, so that paging takes it; 600 blocks of 256."""


def kept(name: str, *shapes: tuple[int, ...], linear: bool = False) -> tuple[int, Any]:
    parameters = [torch.nn.Parameter(torch.empty(s, dtype=torch.bfloat16, device="meta")) for s in shapes]
    opt = optimizer(name, parameters, [linear and p.dim() == 2 for p in parameters])
    for p in parameters:
        p.grad = torch.empty_like(p)
    with fused_on_meta():
        opt.step()
        opt.step()
    return sum(t.numel() * t.element_size() for _, t in states(opt)), opt


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("adamw_torch_fused", 4 * N + 4),
        ("adamw_torch", 4 * N + 4),
        ("adamw_torch_loop", 4 * N + 4),
        ("sgd", 0),
        ("sgd_momentum", 2 * N),
        ("adagrad", 2 * N + 4),
        ("rmsprop", 2 * N + 4),
        ("adafactor", 4 * (512 + 300) + 4),  # a row, a column and the update's RMS in fp32
        ("adamw_8bit", 2 * N + 2 * 600 * 4 + 2 * 256 * 4),
        ("ademamix_8bit", 3 * N + 3 * 600 * 4 + 2 * 256 * 4),
        ("lion", 4 * N),
        ("lion_8bit", N + 600 * 4 + 2 * 256 * 4),
        ("paged_adamw_32bit", 0),
        ("paged_adamw_8bit", 2 * 600 * 4 + 2 * 256 * 4),
    ],
)
def test_states_of_one_matrix(name: str, want: int) -> None:
    on_device = kept(name, (512, 300))[0]
    steps = 4 if name in ("adamw_torch", "adamw_torch_loop", "adagrad", "rmsprop") else 0
    assert on_device in (want, want - steps)  # a step is a number on the CPU in some


def test_small_tensors_keep_fp32_states_without_scales() -> None:
    assert kept("adamw_8bit", (4095,))[0] == 2 * 4 * 4095 + 2 * 256 * 4
    assert kept("adamw_8bit", (4096,))[0] == 2 * 4096 + 2 * 16 * 4 + 2 * 256 * 4


def test_paged_states_of_large_tensors_are_not_the_allocators() -> None:
    on_device, opt = kept("paged_adamw_8bit", (512, 300), (4096,))
    assert opt.managed_bytes == 2 * N
    assert on_device == 2 * 600 * 4 + 2 * 4096 + 2 * 16 * 4 + 2 * 256 * 4


@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
def test_galore_keeps_states_of_the_projected_gradient(shape: tuple[int, int]) -> None:
    # rank 128 along the shorter side: projection 128 × 512, states 128 × 1024
    assert kept("galore_adamw", shape, linear=True)[0] == 2 * (128 * 512 + 2 * 128 * 1024)
    assert kept("apollo_adamw", shape, linear=True)[0] == 2 * (256 * 512 + 2 * 256 * 1024)


def test_muon_keeps_one_momentum_of_matrices_and_two_states_of_the_rest() -> None:
    assert kept("muon", (512, 300), (300,), linear=True)[0] == 2 * N + 2 * 2 * 300 + 4


def test_unknown_names_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(HfvramError, match="adamx is unknown: valid are adamw_torch_fused, "):
        optimizer("adamx", [])


def test_the_command_line_knows_the_same_names() -> None:
    assert tuple(OPTIMIZERS) == supported.OPTIMIZERS
