"""llama.cpp's buffers: by hand, against what logs print, and what quantizing makes of a model."""

import json
from math import prod
from pathlib import Path

import pytest
from ggufs import LLAMA, gguf, llama

from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.memory.serving.llama_cache import TYPES, Cells, caches
from hfvram.memory.serving.llama_compute import compute_bytes
from hfvram.memory.serving.llama_cpp import LlamaPlan, Options, plan
from hfvram.memory.serving.llama_quant import BASES, quantized
from hfvram.model.architecture import Architecture
from hfvram.model.gguf_names import tensors
from hfvram.model.infer import infer
from hfvram.read import catalogue
from hfvram.read.catalogue import lookup
from hfvram.read.checkpoint import StoredTensor
from hfvram.request import GGUF_CACHES, GGUF_QUANTS, Request
from hfvram.units import MiB

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def known(name: str) -> Architecture:
    entry = lookup(name)
    assert entry is not None
    return infer(entry.config)


def file(name: str, mixture: str) -> tuple[StoredTensor, ...]:
    a = known(name)
    return quantized(tensors(a), a, mixture, "BF16")


def planned(name: str, mixture: str = "Q4_K_M", **options: object) -> LlamaPlan:
    o = Options(cells=options.pop("cells", Cells(ctx=4096)), **options)  # type: ignore[arg-type]
    return plan(known(name), file(name, mixture), o)


@pytest.mark.parametrize(
    ("name", "mixture", "gigabytes"),
    [
        # Sizes of published files in GB, less 8 MB of header.
        (LLAMA_8B, "Q2_K", 3.18),
        (LLAMA_8B, "Q3_K_M", 4.02),
        (LLAMA_8B, "IQ3_M", 3.78),
        (LLAMA_8B, "IQ4_XS", 4.45),
        (LLAMA_8B, "Q4_K_S", 4.69),
        (LLAMA_8B, "Q4_K_M", 4.92),
        (LLAMA_8B, "Q5_K_M", 5.73),
        (LLAMA_8B, "Q6_K", 6.60),
        (LLAMA_8B, "Q8_0", 8.54),
        ("meta-llama/Llama-3.1-70B-Instruct", "Q4_K_M", 42.52),
        ("Qwen/Qwen3-8B", "Q4_K_M", 5.03),
        ("google/gemma-2-9b-it", "Q4_K_M", 5.76),
    ],
)
def test_files_as_they_are_published(name: str, mixture: str, gigabytes: float) -> None:
    assert sum(t.nbytes for t in file(name, mixture)) == pytest.approx(gigabytes * 1e9 - 8e6, abs=7e6)


def test_no_parameter_is_lost_or_made_up() -> None:
    for name in (LLAMA_8B, "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V2-Lite", "Qwen/Qwen3-30B-A3B"):
        a = known(name)
        own = [p for p in (*a.text.params(), *a.head) if p.kind != "buffer"]
        assert sum(prod(t.shape) for t in tensors(a)) == sum(p.numel for p in own), name


def test_weights_on_the_gpu_as_a_log_prints_them() -> None:
    """Llama 3.1 8B in Q4_K_M, all 33 layers on the GPU: CUDA0 4403.49 MiB, CPU 281.81 MiB."""
    found = planned(LLAMA_8B)
    assert (found.weights_bytes + found.padding_bytes) / MiB == pytest.approx(4403.49, abs=0.01)
    assert found.cpu_bytes / MiB == pytest.approx(281.81, abs=0.01)


def test_layers_are_moved_from_the_first_and_their_cache_with_them() -> None:
    whole = planned(LLAMA_8B)
    assert whole.gpu_layers == 33
    half = planned(LLAMA_8B, gpu_layers=17)  # 16 layers and the output
    assert [c.layer for c in half.gpu_caches] == list(range(16, 32))
    assert {t.name for t in half.on_gpu} >= {"output.weight", "blk.16.attn_q.weight", "blk.31.ffn_up.weight"}
    assert "blk.15.attn_q.weight" in {t.name for t in half.on_cpu}
    assert half.cache_bytes * 2 == whole.cache_bytes
    head = planned(LLAMA_8B, gpu_layers=1)
    assert {t.name for t in head.on_gpu} == {"output.weight", "model.norm.weight"} or len(head.on_gpu) == 2
    none = planned(LLAMA_8B, gpu_layers=0)
    assert (none.on_gpu, none.gpu_caches) == ((), ())
    assert none.cpu_bytes == whole.cpu_bytes + whole.weights_bytes + whole.cache_bytes


def test_experts_and_patterns_stay_in_cpu_memory() -> None:
    some = planned("Qwen/Qwen3-30B-A3B", cpu_moe=10)
    moved = [t.name for t in some.on_cpu]
    assert len(moved) == 31
    assert all("_exps" in n for n in moved if n != "token_embd.weight")
    assert "blk.10.ffn_up_exps.weight" not in moved
    by_pattern = planned("Qwen/Qwen3-30B-A3B", overrides=(r"blk\.\d\.ffn_.*_exps",))
    assert {t.name for t in by_pattern.on_cpu} == set(moved)
    assert some.cache_bytes == planned("Qwen/Qwen3-30B-A3B").cache_bytes


def test_a_tied_embedding_stands_twice() -> None:
    found = planned("google/gemma-2-9b-it", "Q8_0")
    # 256,000 × 3,584 in Q8_0 on each side
    size = 256_000 * 3_584 // 32 * 34
    assert sum(t.nbytes for t in found.on_cpu) == size == found.copied_bytes
    assert next(t.nbytes for t in found.on_gpu if t.name == "output.weight") == size


def cache(name: str, kind: str, cells: Cells, dtype: str = "f16") -> float:
    return sum(c.nbytes for c in caches(known(name), cells, dtype, dtype) if c.kind == kind) / MiB


def test_caches_as_logs_print_them() -> None:
    """Rows of fixtures/published, by hand: 2·28·1024·2·1024, and so on."""
    assert cache("Qwen/Qwen3-1.7B", "full attention", Cells(ctx=1024)) == 112.0
    server = Cells(ctx=65536, sequences=4, unified=True)
    assert cache("openai/gpt-oss-120b", "full attention", server) == 2304.0
    assert cache("openai/gpt-oss-120b", "sliding window", server) == 36.0
    assert cache("openai/gpt-oss-120b", "sliding window", Cells(ctx=4096, swa_full=True)) == 144.0
    assert cache("google/gemma-2-2b-it", "sliding window", Cells(ctx=8192, sequences=4, unified=True)) == 416.0
    assert cache("Qwen/Qwen3-4B", "full attention", Cells(ctx=32768), "q8_0") == 2448.0
    assert cache("Qwen/Qwen3-4B", "full attention", Cells(ctx=32768), "q4_0") == 1296.0


def test_streams_and_padding() -> None:
    assert Cells(ctx=1000, sequences=3).full == 1024
    # each stream has its own window, one cache room for all
    apart, together = Cells(ctx=8192, sequences=4), Cells(ctx=8192, sequences=4, unified=True)
    assert (apart.window(1024) * apart.streams, together.window(1024) * together.streams) == (4 * 1536, 4608)
    assert cache("Qwen/Qwen3-4B", "full attention", apart) == 4 * cache("Qwen/Qwen3-4B", "full attention", together)
    assert Cells(ctx=256).window(4096) == 256


def test_latent_attention_keeps_one_vector_and_no_values() -> None:
    # 27 layers of 512 + 64 elements
    assert cache("deepseek-ai/DeepSeek-V2-Lite", "latent attention", Cells(ctx=4096)) * MiB == 27 * 4096 * 576 * 2


def test_types_and_mixtures_are_those_that_can_be_asked_for() -> None:
    assert set(BASES) == set(GGUF_QUANTS)
    assert set(TYPES) == {*GGUF_CACHES, "bf16"}
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {t.name.lower(): tuple(s) for t, s in GGML_QUANT_SIZES.items()}
    assert {k: sizes[k] for k in TYPES} == TYPES
    assert set(BASES.values()) <= {t.name for t in GGMLQuantizationType}


@pytest.mark.parametrize("mixture", GGUF_QUANTS)
def test_every_mixture_has_a_size_between_one_bit_and_its_own(mixture: str) -> None:
    bits = sum(t.nbytes for t in file("Qwen/Qwen3-0.6B", mixture)) * 8 / known("Qwen/Qwen3-0.6B").parameters
    assert 1.5 < bits < 32.1


def test_compute_buffers_are_near_what_logs_print() -> None:
    """Older builds, which compute all logits: 258.5 MiB for Llama 3 8B, 300.75 for Qwen3 1.7B with 1,024 cells."""
    for name, ctx, printed in ((LLAMA_8B, 8192, 258.5), ("Qwen/Qwen3-1.7B", 1024, 300.75)):
        low, likely, high = compute_bytes(known(name), Cells(ctx=ctx))
        assert low < likely < high
        assert high / MiB == pytest.approx(printed, rel=0.05)
    # 27B of the Qwen3.5 kind with 32,768 cells: 154.02 MiB at an ubatch of 512, 38.5 at 128
    if lookup("Qwen/Qwen3.5-27B"):
        for ubatch, printed in ((512, 154.02), (128, 38.5)):
            _, likely, _ = compute_bytes(known("Qwen/Qwen3.5-27B"), Cells(ctx=32768, ubatch=ubatch))
            assert likely / MiB == pytest.approx(printed, rel=0.15)


def test_a_buffer_pads_rows_of_quantized_tensors() -> None:
    a = known("Qwen/Qwen3-0.6B")
    # 100 rows of 256 in Q8_0 are 27,200 B: half a row of 512 more is 272 B, then up to 128: 27,520
    odd = StoredTensor("blk.0.x.weight", "Q8_0", (100, 256), 27_200)
    found = plan(a, (odd,), Options(cells=Cells(ctx=256)))
    assert found.padding_bytes == 27_520 - 27_200


def test_layers_that_predict_ahead_are_not_loaded() -> None:
    keys = {**LLAMA, "block_count": 3, "nextn_predict_layers": 1}
    from hfvram.model.gguf import read
    from hfvram.read.cursor import Cursor
    from hfvram.read.gguf import parse_gguf

    made = gguf("llama", keys, llama(3))
    whole = made.head + bytes(made.size - len(made.head))
    header = parse_gguf(Cursor(lambda s: [whole[a:b] for a, b in s], made.size, step=4096, largest=4096), "x")
    a = read(header.metadata, header.tensors)
    found = plan(a, header.tensors, Options(cells=Cells(ctx=256)))
    assert len(a.text.layers) == 2
    assert not [t for t in found.on_gpu + found.on_cpu if t.name.startswith("blk.2.")]


def test_an_engine_of_another_kind_is_refused() -> None:
    with pytest.raises(HfvramError, match=r"Whisper.* not supported with --engine llama\.cpp"):
        Session().estimate("openai/whisper-tiny", Request(engine="llama.cpp"), offline=True)


@pytest.mark.slow
def test_every_decoder_of_the_catalogue_becomes_a_file_without_loss() -> None:
    models = json.loads((Path(catalogue.__file__).with_name("catalogue.json")).read_text())["models"]
    answered = 0
    for name in models:
        a = known(name)
        if a.task == "seq2seq" or not a.closed_form:
            continue
        found = tensors(a)
        own = [p for p in (*a.text.params(), *a.head) if p.kind != "buffer" and "pooler" not in p.name]
        count = sum(p.numel for p in own)
        assert sum(prod(t.shape) for t in found) == count, name
        if count > 5 * 10**8:
            bits = sum(t.nbytes for t in quantized(found, a, "Q4_K_M", "BF16")) * 8 / count
            assert 4.4 < bits < 6.5, name  # rows that 256 doesn't divide take 5 to 8 bits
        answered += 1
    assert answered > 300
