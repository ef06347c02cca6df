"""A model placed over several GPUs: the map is accelerate's own, the bytes are worked by hand."""

import json
from typing import Any

import pytest

import hfvram
from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.formula import placed, timeline
from hfvram.memory.placement import device_of, places
from hfvram.model.infer import infer
from hfvram.request import Request
from hfvram.show.explain import explain
from hfvram.show.markdown import markdown
from hfvram.show.text import text
from hfvram.units import gib

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from hfvram.memory.exact.device_map import device_map
from hfvram.model import meta

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LAYER = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) * 2
"""Queries and output, keys and values, the MLP, two norms: 36,992 weights in bf16."""
TABLE = 512 * 64 * 2
NORM = 64 * 2
CACHE = 2 * 2 * 16 * 2
"""A token's keys and values in one layer: two heads of 16 in bf16."""


def auto(gpus: int, free: int, cpu: int | None = None, quant: str = "none", **config: Any) -> dict[str, Any]:
    values = LLAMA | config
    return device_map(infer(values), values, "bf16", quant, True, gpus, free, cpu)


def of_layers(found: dict[str, Any]) -> list[Any]:
    return [device_of(f"model.layers.{i}.mlp", found) for i in range(8)]


def request(**options: Any) -> Request:
    asked = {"ctx": 64, "new_tokens": 4, "phase": "generate", "dtype": "bf16", "quant": "none", "gpus": 2}
    return Request.from_dict(asked | options)


@pytest.mark.parametrize(
    ("gpus", "free", "cpu"),
    [(2, 10**6, None), (3, 10**6, None), (2, 4 * LAYER, None), (2, 4 * LAYER, 3 * LAYER), (1, 8 * LAYER, None)],
    ids=["two GPUs", "three GPUs", "two GPUs and CPU", "two GPUs, CPU and disk", "one GPU and CPU"],
)
def test_the_map_is_accelerates_own(gpus: int, free: int, cpu: int | None) -> None:
    """accelerate's functions on the same model, given what transformers gives them: nine tenths of a lone GPU and of
    CPU memory."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    model = meta.build(LLAMA, "LlamaForCausalLM", "bf16")
    room: dict[Any, Any] = dict.fromkeys(range(gpus), free * 0.9 if gpus == 1 else free)
    room["cpu"] = 0.9 * cpu if cpu else 10**12
    whole = ["LlamaDecoderLayer"]
    room = get_balanced_memory(model, room, whole)
    own = infer_auto_device_map(model, room, whole)
    found = auto(gpus, free, cpu)
    names = [name for name, _ in model.named_parameters()]
    assert {n: device_of(n, found) for n in names} == {n: device_of(n, own) for n in names}
    devices = {str(d) for d in found.values()}
    assert ("cpu" in devices, "disk" in devices) == (free < 10**6, cpu is not None)


def test_weights_of_each_device_by_hand() -> None:
    # Balanced: (2 tables + 8 layers + norm) / 2 + 1.25 · a layer = 5.37·73,984 B + 65,536 B a GPU. GPU 0 keeps the
    # largest module's room (a layer's) free: a table and 3 layers go there; all the others fit on GPU 1.
    found = auto(2, 10**6)
    first, second = places(infer(LLAMA), found, 2, "bf16", "none", True)
    layers = sum(d == 0 for d in of_layers(found))
    assert (first.modules, second.modules) == (
        f"embed_tokens, layers 0–{layers - 1}",
        f"layers {layers}–7, norm, lm_head",
    )
    assert first.weights_bytes == TABLE + layers * LAYER
    assert second.weights_bytes == (8 - layers) * LAYER + NORM + TABLE
    per_gpu = (2 * TABLE + 8 * LAYER + NORM) // 2 + int(1.25 * LAYER)
    assert layers == (per_gpu - LAYER - TABLE) // LAYER


def test_what_is_placed_adds_up_to_the_model() -> None:
    architecture = infer(LLAMA)
    found = auto(2, 4 * LAYER, 3 * LAYER)
    where = places(architecture, found, 2, "bf16", "none", True)
    assert [p.device for p in where] == [0, 1, "cpu", "disk"]
    assert sum(p.weights_bytes for p in where) == architecture.parameters * 2
    first, second = placed(architecture, request(), found)
    away = {place: nbytes for place, _, nbytes in first.timeline.elsewhere}
    assert away == {p.device: p.weights_bytes for p in where if not isinstance(p.device, int)}
    for share, place in zip((first, second), where, strict=False):
        weights = sum(n for n, tag in share.timeline.standing.tensors if tag.category == "weights")
        assert weights == place.weights_bytes


MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "architectures": None}
MAMBA = {"model_type": "mamba", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 16}
GEMMA = LLAMA | {"model_type": "gemma2", "head_dim": 16, "architectures": None, "tie_word_embeddings": True}
MODELS = [LLAMA, LLAMA | {"tie_word_embeddings": True}, MIXTRAL, MAMBA, GEMMA]


@pytest.mark.parametrize("config", MODELS, ids=["untied", "tied", "Mixtral", "Mamba", "Gemma 2"])
@pytest.mark.parametrize("options", [{}, {"phase": "prefill", "new_tokens": None}, {"batch": 3, "attention": "eager"}])
def test_a_model_placed_on_one_gpu_runs_as_it_does_without_a_map(
    config: dict[str, Any], options: dict[str, Any]
) -> None:
    architecture = infer(config)
    whole = timeline(architecture, request(**options))
    alone, idle = placed(architecture, request(**options), {"": 0})
    assert [n for n in alone.timeline.sizes if n] == [n for n in whole.sizes if n]
    assert replay(alone.timeline, False) == replay(whole, False)
    assert alone.timeline.cache_bytes == whole.cache_bytes
    assert not idle.timeline.sizes
    assert not idle.timeline.standing.tensors


def test_a_gpu_keeps_the_cache_of_the_layers_that_it_runs() -> None:
    found = auto(2, 4 * LAYER, 3 * LAYER)
    where = of_layers(found)
    first, second = (s.timeline for s in placed(infer(LLAMA), request(), found))
    assert second.cache_bytes == where.count(1) * 63 * CACHE
    assert first.cache_bytes == (8 - where.count(1)) * 63 * CACHE  # those of CPU and disk run there, too
    brought = [n for n, tag in zip(first.sizes, first.tags, strict=True) if n and "brought" in tag.name]
    assert not any("brought" in tag.name for tag in second.tags)
    # In the prefill and two of the steps after it, two of the layers written out; the head comes each time.
    assert set(brought) == {64 * 128 * 2, TABLE}
    assert brought.count(TABLE) == 3


def test_the_second_gpu_receives_hidden_states_and_sends_logits_back() -> None:
    first, second = (s.timeline for s in placed(infer(LLAMA), request(batch=2), auto(2, 10**6)))
    received = [
        n for n, tag in zip(second.sizes, second.tags, strict=True) if tag.name.startswith("hidden states from")
    ]
    assert received == [2 * 60 * 64 * 2, 2 * 64 * 2, 2 * 64 * 2]
    assert [n for n, tag in zip(second.sizes, second.tags, strict=True) if tag.name == "logits"] == [2 * 512 * 2] * 3
    assert [n for n, tag in zip(first.sizes, first.tags, strict=True) if tag.name == "logits"] == [2048, 4096] * 3


def test_an_embedding_in_cpu_memory_comes_for_every_token() -> None:
    found: dict[str, Any] = {"model.embed_tokens": "cpu", "model.layers": 0, "model.norm": 1, "lm_head": 1}
    first, second = (s.timeline for s in placed(infer(LLAMA), request(), found))
    assert [n for n, tag in zip(first.sizes, first.tags, strict=True) if "brought" in tag.name] == [TABLE] * 3
    assert not any("brought" in tag.name for tag in second.tags)


def test_positions_in_cpu_memory_come_to_the_first_gpu_wherever_tokens_are_embedded() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 96, "vocab_size": 512}
    found: dict[str, Any] = {"transformer": 0, "transformer.wte": 1, "transformer.wpe": "cpu", "lm_head": 1}
    first, second = (s.timeline for s in placed(infer(gpt2), request(), found))
    assert [n for n, tag in zip(first.sizes, first.tags, strict=True) if "brought" in tag.name] == [96 * 64 * 2] * 3
    assert any(tag.name.startswith("hidden states from") for tag in first.tags)
    assert not any(tag.name.startswith("hidden states from") for tag in second.tags)


def test_a_split_layer_runs_where_most_of_it_is() -> None:
    found: dict[str, Any] = {"model": 0, "lm_head": 0, "model.layers.7.mlp": 1}
    first, second = (s.timeline for s in placed(infer(LLAMA), request(), found))
    assert (first.cache_bytes, second.cache_bytes) == (7 * 63 * CACHE, 63 * CACHE)
    (_, place) = places(infer(LLAMA), found, 2, "bf16", "none", True)
    assert (place.modules, place.weights_bytes) == ("layer 7", 3 * 64 * 128 * 2)


def test_bitsandbytes_counts_half_a_byte_and_keeps_a_tenth_back() -> None:
    # A layer's matrices take 18,432 B in nf4, so that what is 8 bf16 layers' room on GPUs holds twice the layers.
    assert "cpu" in auto(2, 4 * LAYER).values()
    assert "cpu" not in auto(2, 4 * LAYER, quant="nf4").values()


def estimate(**options: Any) -> hfvram.Estimate:
    return hfvram.estimate("gpt2", offline=True, gpus=2, **options)


def test_a_model_that_fits_two_gpus() -> None:
    answer = estimate(gpu="1.2GB", dtype="fp32", ctx=64)
    assert [p.device for p in answer.placement] == ["GPU 0", "GPU 1"]
    assert sum(p.weights_bytes for p in answer.placement) == answer.model.parameters * 4
    assert [r.name for r in answer.ranks] == ["GPU 0", "GPU 1"]
    assert answer.device_bytes == max(r.device_bytes for r in answer.ranks)
    assert answer.fit
    assert answer.fit.fits
    assert not any("max_memory" in w for w in answer.warnings)
    assert all(i.certainty != "calibrated" for i in answer.items if i.category in ("activations", "workspace"))
    assert (answer.cpu_bytes, answer.disk_bytes) == (0, 0)


def test_what_lands_in_cpu_memory_does_not_fit_unless_that_is_asked_for() -> None:
    answer = estimate(gpu="780MB", dtype="fp32", ctx=64)
    away = sum(p.weights_bytes for p in answer.placement if p.device == "cpu")
    assert answer.cpu_bytes == away > 0
    assert answer.fit
    assert not answer.fit.fits
    assert answer.fit.headroom_bytes == min(-away, answer.fit.capacity_bytes - answer.device_bytes)
    assert answer.fit.max_ctx == 0
    fullest = answer.device_bytes - answer.weights_bytes
    assert any(f"takes {gib(fullest)} beside its weights: max_memory" in w for w in answer.warnings)
    assert any("--offload layers" in w for w in answer.warnings)
    asked = estimate(gpu="780MB", dtype="fp32", ctx=64, offload=["layers"])
    assert asked.placement == answer.placement
    assert asked.fit
    assert asked.fit.headroom_bytes == asked.fit.capacity_bytes - asked.device_bytes


def test_more_gpus_are_a_way_to_fit() -> None:
    answer = hfvram.estimate("mistralai/Mixtral-8x7B-v0.1", offline=True, gpus=2, gpu="48GB", ctx=512)
    assert answer.fit
    ways = {way.change: way.device_bytes for way in answer.fit.ways}
    again = hfvram.estimate("mistralai/Mixtral-8x7B-v0.1", offline=True, gpus=4, gpu="48GB", ctx=512)
    assert again.fit
    assert again.fit.fits
    assert ways["--gpus 4"] == again.device_bytes


def test_little_cpu_memory_sends_the_rest_to_disk() -> None:
    answer = estimate(gpu="780MB", dtype="fp32", ctx=64, cpu_memory="80MB", offload=["layers"])
    assert [p.device for p in answer.placement] == ["GPU 0", "GPU 1", "cpu", "disk"]
    assert answer.disk_bytes > 0
    assert sum(p.weights_bytes for p in answer.placement) == answer.model.parameters * 4


def test_transformers_refuses_8_bits_beside_the_cpu() -> None:
    answer = estimate(gpu="700MB", dtype="fp32", quant="int8", ctx=64, offload=["layers"])
    assert answer.cpu_bytes
    assert answer.fit
    assert not answer.fit.fits
    assert any("transformers refuses int8" in w for w in answer.warnings)


def test_it_is_shown() -> None:
    answer = estimate(gpu="780MB", dtype="fp32", ctx=64, cpu_memory="80MB")
    for shown in (text(answer, 100), markdown(answer), explain(answer, 100)):
        assert "placed on" in shown
        assert answer.placement[0].modules in shown
        assert "on disk" in shown.lower()
    assert "does not fit 2 × 780MB" in text(answer, 100)
    told = json.loads(json.dumps(answer.to_dict()))
    assert told["placement"][0] == {
        "device": "GPU 0",
        **{k: getattr(answer.placement[0], k) for k in ("modules", "weights_bytes")},
    }
    assert Request.from_dict(told["request"]) == answer.request


def test_without_a_size_gpus_hold_replicas() -> None:
    alone, two = hfvram.estimate("gpt2", offline=True), estimate()
    assert two.placement == ()
    assert two.device_bytes == alone.device_bytes
    assert any("each of the 2 GPUs holds the whole model" in w for w in two.warnings)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("google-t5/t5-small", {}, "can't be placed"),
        ("mistralai/Mixtral-8x7B-v0.1", {"offload": ["experts"]}, "valid is --offload layers"),
        ("gpt2", {"method": "simulate"}, "only a formula answers for a placed model"),
        ("gpt2", {"cpu_memory": "much"}, "--cpu-memory much is not a size"),
    ],
)
def test_what_cannot_be_placed_is_usage(model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(HfvramError, match=said) as caught:
        hfvram.estimate(model, offline=True, gpus=2, gpu="80GB", **options)
    assert caught.value.kind == "usage"


def test_a_module_that_the_map_does_not_know_is_usage() -> None:
    with pytest.raises(HfvramError, match="has no lm_head"):
        placed(infer(LLAMA), request(), {"model": 0})


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    config = LLAMA | {"vocab_size": 513}
    with pytest.raises(HfvramError, match=r"needs accelerate: pip install 'hfvram\[exact\]'") as caught:
        device_map(infer(config), config, "bf16", "none", True, 2, 10**6, None)
    assert caught.value.kind == "missing_extra"
