"""Training on one rank of many: what it holds by hand arithmetic, what an H100 measured, and nothing that leaks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hfvram import Request, estimate
from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact import data_parallel, ranks, sharded  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402
from hfvram.model import meta  # noqa: E402

pytestmark = pytest.mark.slow

MEASURED = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
CASES = {c["id"]: c for c in map(json.loads, MEASURED.read_text().splitlines()) if c["request"].get("fsdp")}

# Embedding and head 256·64 each; a layer: q and o 64·64, k and v 32·64, three of 64·128, two norms of 64; a last norm.
EMBEDDING = HEAD = 256 * 64
SPLIT = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
NORMS = 4 * 2 * 64 + 64
PARAMETERS = EMBEDDING + HEAD + SPLIT + NORMS
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def run(config: dict[str, Any] = TINY, **options: Any) -> Timeline:
    defaults = {"mode": "train", "dtype": "bf16", "ctx": 32, "method": "simulate"}
    return simulate(config, None, Request(**{**defaults, **options}))


def standing(timeline: Timeline) -> dict[str, int]:
    """Bytes by category of what stands when training starts."""
    found: dict[str, int] = {}
    for handle in timeline.live(timeline.restarts[-1]):
        category = timeline.tags[handle].category
        found[category] = found.get(category, 0) + timeline.sizes[handle]
    return found


def peak(timeline: Timeline) -> int:
    return timeline.fullest_bytes()


def refusal(**options: Any) -> str:
    with pytest.raises(HfvramError) as raised:
        run(**options)
    assert raised.value.kind == "usage"
    return raised.value.message


@pytest.mark.parametrize(
    "case", [c for name, c in CASES.items() if "llama32_1b" in name or "llama2_7b" in name], ids=lambda c: c["id"]
)
def test_the_peaks_of_an_h100(case: dict[str, Any]) -> None:
    peaks = replay(run(case["config"], **case["request"]))
    assert peaks.allocated_bytes == pytest.approx(case["measured"]["peak_allocated_bytes"], rel=1e-4)
    assert peaks.reserved_bytes == pytest.approx(case["measured"]["peak_reserved_bytes"], rel=1.5e-3)


def test_there_are_measured_cases_of_each_kind() -> None:
    assert len(CASES) == 7
    assert {c["request"]["fsdp"] for c in CASES.values()} == {"full_shard", "shard_grad_op"}


@pytest.mark.parametrize(
    ("options", "elements"),
    [
        ({"gpus": 4, "fsdp": "full_shard"}, PARAMETERS // 4),
        ({"gpus": 4, "fsdp": "shard_grad_op"}, PARAMETERS // 4),
        ({"gpus": 16, "fsdp": "hybrid_shard"}, PARAMETERS // 8),  # within a node of 8
        ({"gpus": 2, "tp": 2}, EMBEDDING + NORMS + (HEAD + SPLIT) // 2),
        ({"gpus": 8, "tp": 2, "fsdp": "full_shard"}, (EMBEDDING + NORMS + (HEAD + SPLIT) // 2) // 4),
        ({"gpus": 4}, PARAMETERS),
    ],
)
def test_the_weights_that_one_rank_holds(options: dict[str, Any], elements: int) -> None:
    assert standing(run(**options))["weights"] == 2 * elements


def test_a_tied_embedding_is_split_with_its_head() -> None:
    timeline = run({**TINY, "tie_word_embeddings": True}, gpus=2, tp=2)
    assert standing(timeline)["weights"] == 2 * (NORMS + (EMBEDDING + SPLIT) // 2)


def test_two_worlds_in_one_process_and_nothing_is_left() -> None:
    def state() -> dict[str, dict[str, object]]:
        modules = {name: module for name, module in sys.modules.items() if name.startswith(sharded.FSDP)}
        group = modules[sharded.FSDP + "_fsdp_param_group"].FSDPParamGroup
        return {name: dict(vars(module)) for name, module in modules.items()} | {"group": dict(vars(group))}

    before, hook = state(), sys.excepthook
    weights = [standing(run(gpus=n, fsdp="full_shard"))["weights"] for n in (4, 8, 4)]
    assert weights == [2 * PARAMETERS // 4, 2 * PARAMETERS // 8, 2 * PARAMETERS // 4]
    with pytest.raises(HfvramError):
        run({**TINY, "num_attention_heads": 3}, gpus=2, fsdp="full_shard")
    assert state() == before
    assert sys.excepthook is hook
    assert not torch.distributed.is_initialized()


def test_a_process_that_is_a_rank_itself_is_refused() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert "distributed job" in refusal(gpus=2, fsdp="full_shard")
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_each_stream_has_a_pool_of_its_own() -> None:
    config = {**TINY, "hidden_size": 1024, "intermediate_size": 4096}
    timeline = run(config, gpus=8, fsdp="full_shard", mixed_precision="bf16", dtype="fp32")
    assert len(set(timeline.streams.values())) == 2  # of the copy into an all-gather, and of the reduce-scatter
    apart = replay(timeline)
    timeline.streams.clear()
    together = replay(timeline)
    assert together.reserved_bytes < apart.reserved_bytes


def test_what_is_not_gathered_again_stands_longer() -> None:
    config = {**TINY, "num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 1024}
    full, grad_op = (run(config, gpus=4, fsdp=f) for f in ("full_shard", "shard_grad_op"))
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 1024
    assert peak(grad_op) - peak(full) > 9 * layer * 2  # all layers but the few that full_shard gathers ahead


def test_mixed_precision_gathers_in_half_and_reduces_in_fp32() -> None:
    config = {**TINY, "hidden_size": 512, "intermediate_size": 2048}
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 2048 + 2 * 512
    sizes = {}
    for precision in ("no", "bf16"):
        timeline = run(config, gpus=2, fsdp="full_shard", dtype="fp32", mixed_precision=precision)
        tags = enumerate(timeline.tags)
        kinds = {(timeline.sizes[h], t.name) for h, t in tags if t.name in (sharded.GATHERED, sharded.REDUCED)}
        sizes[precision] = {n for n in (layer * 2, layer * 4) if (n, sharded.GATHERED) in kinds}
        assert (layer * 4, sharded.REDUCED) in kinds
    assert sizes == {"no": {layer * 4}, "bf16": {layer * 2}}


def test_frozen_weights_are_sharded_and_have_no_gradients() -> None:
    config = {**TINY, "hidden_size": 512, "intermediate_size": 2048}
    timeline = run(config, mode="lora", gpus=4, fsdp="full_shard", gradient_checkpointing=True)
    layer = 2 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 2048)
    reduced = [timeline.sizes[h] for h, tag in enumerate(timeline.tags) if tag.name == sharded.REDUCED]
    assert reduced
    assert max(reduced) < layer / 4
    gathered = [timeline.sizes[h] for h, tag in enumerate(timeline.tags) if tag.name == sharded.GATHERED]
    assert max(gathered) > layer


def test_accumulated_gradients_stay_whole_until_they_are_reduced() -> None:
    once, twice = (run(gpus=4, fsdp="full_shard", grad_accum=n) for n in (1, 4))
    assert peak(twice) - peak(once) > PARAMETERS * 2 / 2


def test_ddp_holds_the_gradients_once_more() -> None:
    alone, replicated = run(), run(gpus=4)
    assert peak(replicated) - peak(alone) == pytest.approx(2 * PARAMETERS, rel=0.05)


def test_ddp_has_one_bucket_first_and_then_buckets_of_25_mib() -> None:
    config = {**TINY, "hidden_size": 1024, "intermediate_size": 3072}
    timeline = run(config, gpus=4)
    matrix = 1024 * 3072
    layer = 2 * 1024 * 1024 + 2 * 512 * 1024 + 3 * matrix + 2 * 1024
    whole = 2 * (2 * 256 * 1024 + 4 * layer + 1024)

    def buckets(at: int) -> list[int]:
        live = timeline.live(at)
        return sorted(timeline.sizes[h] for h in live if timeline.tags[h].name == data_parallel.BUCKETS)

    assert max(buckets(timeline.restarts[-1])) == whole
    *small, third, second, first = buckets(timeline.marks[-1][0])
    # A bucket is full once it has 25 MiB, a last one takes what is left; the first has 1 MiB.
    assert 25 << 20 <= third <= second <= first < (25 << 20) + 2 * matrix
    assert whole <= sum((*small, third, second, first)) < whole + 4096  # beside them: a flag or two of the reducer


def test_hybrid_shards_in_a_node_and_reduces_over_nodes() -> None:
    # What a rank of two nodes holds and gathers is what one of a single node does.
    node, nodes, one = (run(gpus=n, fsdp=f) for n, f in ((8, "full_shard"), (16, "hybrid_shard"), (8, "hybrid_shard")))
    assert standing(nodes) == standing(node) == standing(one)
    assert peak(one) == peak(node)
    assert peak(node) <= peak(nodes) < peak(node) + PARAMETERS * 2 / 8


def test_two_dimensions_gather_what_tensor_parallelism_leaves() -> None:
    config = {**TINY, "hidden_size": 512, "intermediate_size": 2048}
    split = 2 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 2048) // 2 + 2 * 2 * 512  # half of the matrices, both norms
    timeline = run(config, gpus=8, tp=2, fsdp="full_shard")
    gathered = {timeline.sizes[h] for h, tag in enumerate(timeline.tags) if tag.name == sharded.GATHERED}
    assert split in gathered
    assert not any(split < n <= 2 * split for n in gathered)


def packed(config: dict[str, Any], **options: Any) -> tuple[int, set[int]]:
    """Weights that one rank of QLoRA holds, and the sizes of what it gathers."""
    timeline = run(config, mode="qlora", ctx=64, adapter_dtype="bf16", **options)
    gathered = {timeline.sizes[h] for h, tag in enumerate(timeline.tags) if tag.name == sharded.GATHERED}
    return standing(timeline)["weights"], gathered


def test_fsdp_qlora_shards_packed_weights_and_keeps_their_scales_whole() -> None:
    config = {**TINY, "hidden_size": 512, "intermediate_size": 2048}
    shapes = [(512, 512), (256, 512), (256, 512), (512, 512), (2048, 512), (2048, 512), (512, 2048)]
    weights = 4 * sum(n * m for n, m in shapes)
    adapters = 4 * sum(16 * (n + m) for n, m in shapes)
    others = 2 * 256 * 512 + (4 * 2 + 1) * 512  # embedding, head, norms: nothing is cast to fp32
    # An 8-bit scale for 64 weights, an fp32 one for 256 scales; a matrix has 16 + 256 codes and an offset.
    scales = weights // 64 + weights // 64 // 256 * 4 + 4 * 7 * (16 + 256 + 1) * 4
    held, gathered = packed(config, gpus=4, fsdp="full_shard")
    assert held == (weights // 2 + (adapters + others) * 2) // 4 + scales
    assert {n * m // 2 for n, m in shapes} <= gathered


def test_replicated_qlora_is_what_one_gpu_holds() -> None:
    assert packed(TINY, gpus=4)[0] == packed(TINY)[0]


@pytest.mark.parametrize(
    ("kind", "config", "count", "of"),
    [
        ("llama", TINY, 4, "LlamaDecoderLayer"),
        ("gpt2", {"model_type": "gpt2", "n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 64}, 3, "GPT2Block"),
        # the embeddings, which are never split either, are tied to the head
        ("bert", {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 2}, 2, "BertLayer"),
    ],
)
def test_layers_are_what_is_never_split(kind: str, config: dict[str, Any], count: int, of: str) -> None:
    found = sharded.layers(meta.build(config, None, "bf16"))
    assert [type(m).__name__ for m in found] == [of] * count


def test_layers_of_a_model_that_says_nothing_are_its_longest_list() -> None:
    model = torch.nn.Module()
    model.few = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    model.many = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(5))
    assert sharded.layers(model) == list(model.many)[::-1]


def test_the_cache_of_a_tensor_parallel_rank() -> None:
    whole, half = (run(mode="inference", phase="generate", new_tokens=4, tp=n, gpus=n) for n in (1, 2))
    assert whole.cache_bytes == 2 * 4 * 2 * 16 * 31 * 2  # keys and values, layers, heads, width, ctx − 1, bytes
    assert half.cache_bytes * 2 == whole.cache_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 4, "gpus": 4}, "--tp 4 does not divide 2 and 4 heads: valid are 1, 2"),
        ({"tp": 2, "gpus": 4}, "trains with --fsdp"),
        ({"tp": 2, "gpus": 2, "mode": "qlora"}, "--tp can't split weights of --quant nf4"),
        ({"tp": 2, "quant": "int8", "mode": "inference", "phase": "prefill"}, "valid is --quant none"),
        ({"gpus": 4, "fsdp": "full_shard", "quant": "int8", "mode": "lora"}, "valid are none, nf4 and fp4"),
        (
            {"gpus": 4, "fsdp": "full_shard", "mode": "qlora", "dtype": "fp32", "mixed_precision": "bf16"},
            "valid are --mixed-precision no, or --dtype bf16",
        ),
        ({"gpus": 1 << 20, "fsdp": "full_shard"}, "out of range"),
        ({"gpus": 12, "fsdp": "hybrid_shard"}, "within nodes of 8"),
    ],
)
def test_what_cannot_be_divided_so(options: dict[str, Any], words: str) -> None:
    assert words in refusal(**options)


def test_a_model_without_a_plan_is_not_split() -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    assert "no plan for --tp" in refusal(config=gpt2, tp=2, gpus=2)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"gpus": 8}, (8, 1, 1)),
        ({"gpus": 8, "tp": 4}, (2, 1, 4)),
        ({"gpus": 8, "fsdp": "full_shard"}, (1, 8, 1)),
        ({"gpus": 4, "fsdp": "hybrid_shard"}, (1, 4, 1)),
        ({"gpus": 64, "fsdp": "hybrid_shard", "tp": 8}, (8, 1, 8)),
    ],
)
def test_how_gpus_are_divided(options: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    assert tuple(ranks.mesh_sizes(Request(**options)).values()) == sizes


def test_the_road_with_several_gpus(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": 64}))
    found = estimate(str(tmp_path), mode="train", method="simulate", gpus=4, fsdp="full_shard", dtype="bf16")
    assert (found.method, found.request.gpus) == ("simulate", 4)
    assert any("the first of 4" in warning for warning in found.warnings)
    hybrid = estimate(str(tmp_path), mode="qlora", method="simulate", gpus=16, fsdp="hybrid_shard", dtype="bf16")
    assert any("nodes of 8 GPUs" in warning for warning in hybrid.warnings)
    assert any("4-bit weights packed" in warning for warning in hybrid.warnings)
    assert sum(item.bytes for item in found.items) == found.peak_allocated_bytes
    with pytest.raises(HfvramError, match="--gpus 6 is not divisible"):
        estimate(str(tmp_path), method="simulate", gpus=6, tp=4)
    with pytest.raises(HfvramError, match="--fsdp is for training"):
        estimate(str(tmp_path), method="simulate", gpus=6, fsdp="full_shard")
