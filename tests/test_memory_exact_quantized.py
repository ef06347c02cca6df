"""bitsandbytes' layers: their storages by hand, and what a product allocates."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.formula import timeline as by_formula
from hfvram.memory.timeline import Timeline
from hfvram.model.infer import infer
from hfvram.request import Request

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact.quantized import Linear4bit, Linear8bit  # noqa: E402
from hfvram.memory.exact.run import Run  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
IN, OUT = 1024, 2048
NUMEL = IN * OUT


def layer(kind: str, nested: bool = True) -> tuple[Run, Any]:
    run = Run()
    with run.tracker:
        own = torch.nn.Linear(IN, OUT, bias=False, dtype=BF16, device="meta")
        made = Linear8bit(own) if kind == "int8" else Linear4bit(own, BF16, nested)
        del own
    return run, made


def standing(timeline: Timeline) -> list[int]:
    return sorted(timeline.sizes[h] for h in timeline.live(len(timeline.events)))


def product(run: Run, made: Any, rows: int, gradient: bool = False) -> list[int]:
    before = len(run.timeline.sizes)
    with run.tracker, torch.set_grad_enabled(gradient):
        x = torch.empty((1, rows, IN), dtype=BF16, device="meta", requires_grad=gradient)
        out = made(x)
        if gradient:
            torch.autograd.backward([out.sum()])
    return [n for n in run.timeline.sizes[before:] if n not in (32 << 20, rows * IN * 2)]


def test_four_bits() -> None:
    run, _ = layer("nf4", nested=False)
    assert standing(run.timeline) == sorted([NUMEL // 2, NUMEL // 64 * 4, 16 * 4])


def test_nested_scales() -> None:
    run, _ = layer("nf4")
    scales = NUMEL // 64
    assert standing(run.timeline) == sorted([NUMEL // 2, scales, scales // 256 * 4, 256 * 4, 4, 16 * 4])


def test_eight_bits() -> None:
    run, _ = layer("int8")
    assert standing(run.timeline) == [OUT * 4, NUMEL]


def test_a_product_unpacks_scales_and_weights() -> None:
    run, made = layer("nf4")
    scales = NUMEL // 64 * 4
    assert product(run, made, 100) == [scales, scales, NUMEL * 2, 100 * OUT * 2]


def test_few_rows_are_multiplied_by_the_packed_weights() -> None:
    run, made = layer("nf4")
    assert product(run, made, 1) == [OUT * 2]


def test_the_backward_unpacks_again() -> None:
    run, made = layer("nf4")
    assert product(run, made, 100, gradient=True).count(NUMEL * 2) == 2


def test_an_int8_product_holds_int32_fp16_and_its_value_at_once() -> None:
    run, made = layer("int8")
    rows, out = 100, 100 * OUT
    found = product(run, made, rows)
    assert found[-3:] == [out * 4, out * 2, out * 2]
    assert rows * IN in found


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_the_head_is_not_quantized(quant: str) -> None:
    config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    asked = {"ctx": 16, "dtype": "bf16", "phase": "generate", "new_tokens": 2, "quant": quant}
    timeline = simulate(config, None, Request.from_dict(asked))
    stands = {timeline.tags[h].name: timeline.sizes[h] for h in timeline.live(timeline.restarts[0])}
    assert stands["lm_head"] == 512 * 64 * 2
    assert stands["model.layers.*.mlp.gate_proj"] in (128 * 64 // 2, 128 * 64)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_what_is_kept_in_fp32_beside_fp16_is_not_quantized_in_either_engine(quant: str) -> None:
    config = {"model_type": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 1}
    config |= {"vocab_size": 512, "decoder_start_token_id": 0}
    request = Request(ctx=16, dtype="bf16", phase="generate", new_tokens=2, quant=quant)
    exact, formula = simulate(config, None, request), by_formula(infer(config), request)
    stands = {exact.tags[h].name: exact.sizes[h] for h in exact.live(exact.restarts[0])}
    assert stands["encoder.block.*.layer.*.DenseReluDense.wo"] == 128 * 64 * 2
    weights = [exact.sizes[h] for h in exact.live(exact.restarts[0]) if exact.tags[h].category == "weights"]
    assert sum(weights) == sum(n for n, tag in formula.standing.tensors if tag.category == "weights")


def test_stored_formats_are_refused() -> None:
    with pytest.raises(HfvramError, match="awq-4"):
        simulate({"model_type": "llama", "num_hidden_layers": 1}, None, Request(ctx=8, dtype="bf16", quant="awq-4"))
