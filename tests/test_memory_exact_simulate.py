"""The exact engine from end to end, held to what an H100 measured, and no rule about one model."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline
from hfvram.request import Request

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hfvram.memory.exact.simulate import simulate  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MEASURED = [json.loads(line) for line in (ROOT / "fixtures/measured/h100.jsonl").read_text().splitlines()]
INFERENCE = {c["id"]: c for c in MEASURED if c["request"]["mode"] == "inference"}
MEASURED_WITH = "5.17."
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(config: dict[str, Any], **options: Any) -> Timeline:
    asked = {"ctx": 64, "batch": 1, "dtype": "bf16", "phase": "generate", "new_tokens": 4, "quant": "none"} | options
    return simulate(config, (config.get("architectures") or [None])[0], Request.from_dict(asked))


@pytest.mark.skipif(not transformers.__version__.startswith(MEASURED_WITH), reason="measured with another version")
@pytest.mark.parametrize(
    ("case", "reserved_percent"),
    [
        ("llama32_1b.inference.batch1.seq8192", 0.01),
        ("llama32_1b.inference.batch4.seq2048.dtypefp32", 0.01),
        ("llama32_1b.inference.batch8.seq1024.phaseprefill", 0.01),
        ("qwen25_7b.inference.batch8.seq4096", 0.02),  # with a padding mask
        ("llama31_8b.inference.batch1.seq65536", 0.02),
        ("mixtral_16L.inference.batch1.seq8192", 0.01),
        ("bert_large.inference.batch8.seq512.phaseencode", 0.01),
        ("mamba_130m.inference.batch1.seq2048", 0.01),
        ("mamba2_1b3.inference.batch1.seq2048", 0.01),
        ("jamba_8L.inference.batch1.seq2048", 0.01),
        ("qwen3next_4L.inference.batch1.seq2048", 0.01),
        ("llama31_8b.inference.batch1.seq4096.quantint8", 0.01),
        ("qwen25_7b.inference.batch1.seq4096.quantnf4.nodouble_quant", 0.01),
        ("gemma2_2b.inference.batch4.seq8192.cachestatic", 9),  # decoding is compiled on a GPU, into a pool apart
    ],
)
def test_an_h100_measured_the_same(case: str, reserved_percent: float) -> None:
    truth = INFERENCE[case]
    request = Request.from_dict(truth["request"])
    timeline = simulate(truth["config"], truth["config"]["architectures"][0], request)
    peaks, measured = replay(timeline), truth["measured"]
    assert peaks.allocated_bytes == pytest.approx(measured["peak_allocated_bytes"], rel=2e-4)
    assert peaks.reserved_bytes == pytest.approx(measured["peak_reserved_bytes"], rel=reserved_percent / 100)
    assert timeline.cache_bytes == (measured["cache_bytes"] or 0)


def test_what_stands_is_named_by_module() -> None:
    timeline = run(TINY)
    peaks = replay(timeline)
    standing: dict[tuple[str, str], int] = {}
    for handle in timeline.live(peaks.event):
        tag = timeline.tags[handle]
        key = tag.category, tag.name
        standing[key] = standing.get(key, 0) + timeline.sizes[handle]
    assert standing["weights", "model.layers.*.mlp.gate_proj"] == 2 * 64 * 160 * 2
    assert standing["weights", "model.embed_tokens"] == 1024 * 64 * 2
    assert standing["workspace", "cuBLAS workspace"] == 32 << 20
    assert {category for category, _ in standing} >= {"weights", "buffers", "cache", "inputs", "activations"}


def test_the_same_question_has_the_same_answer() -> None:
    first, second = run(TINY), run(TINY)
    assert [first.sizes, first.events, first.marks] == [second.sizes, second.events, second.marks]


def test_errors_are_told_in_a_line() -> None:
    with pytest.raises(HfvramError, match="knows no model type") as unknown:
        run({"model_type": "nothing-like-it"})
    assert unknown.value.kind == "unknown_architecture"
    with pytest.raises(HfvramError, match="--quant gptq-4") as usage:
        run(TINY, quant="gptq-4")
    assert usage.value.kind == "usage"


def test_no_rule_names_a_model() -> None:
    """Names of families in code (not in what a comment tells of the evidence) would be rules about one model."""
    named = set(transformers.CONFIG_MAPPING) - {"auto", "clip"}  # `clip` is also what is done to gradients
    for path in (ROOT / "hfvram/memory/exact").glob("*.py"):
        tree = ast.parse(path.read_text())
        prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                assert node.value.lower() not in named, f"{path.name}: {node.value!r}"
