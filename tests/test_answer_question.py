"""From a name and a request to the estimate: the whole, its verdict, and what is said beside it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub import safetensors

import hfvram
from hfvram.answer.question import Session, taken, understand
from hfvram.errors import HfvramError
from hfvram.model.infer import infer
from hfvram.read.open import read_checkpoint
from hfvram.request import Request

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> str:
    (path / "config.json").write_text(json.dumps(config))
    if tensors:
        file = safetensors(tensors)
        (path / "model.safetensors").write_bytes(file.head + bytes(file.size - len(file.head)))
    return str(path)


def test_totals_are_of_the_whole(tmp_path: Path) -> None:
    e = hfvram.estimate(folder(tmp_path, LLAMA), ctx=1024, batch=3)
    parameters = infer(LLAMA).parameters
    assert (e.weights_bytes, e.model.parameters) == (2 * parameters, parameters)
    assert e.cache_bytes == 3 * 4 * 2 * 4 * 32 * 2 * 1023
    assert sum(i.bytes for i in e.items) == e.peak_allocated_bytes <= e.peak_reserved_bytes < e.device_bytes
    assert (e.method, e.peak_phase in ("prefill", "decode")) == ("formula", True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "simulate"}, {"mode": "train"}], ids=str)
def test_what_padding_would_add_is_told_of_a_batch_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    name = folder(tmp_path, LLAMA)
    told = [
        [w for w in hfvram.estimate(name, ctx=512, **more, **options).warnings if "padding mask" in w]
        for more in ({"batch": 2}, {"batch": 1}, {"batch": 2, "padding": True})
    ]
    assert [len(warnings) for warnings in told] == [1, 0, 0]
    assert ("about" if options.get("method") else "up to") in told[0][0]


@pytest.mark.slow
def test_the_generation_of_the_named_gpu_runs_in_both_engines(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    name = folder(tmp_path, LLAMA)
    for method in ("formula", "simulate"):
        hopper, ada = (hfvram.estimate(name, ctx=512, gpu=gpu, method=method) for gpu in ("H100", "RTX 4090"))
        assert (hopper.request.compute_capability, ada.request.compute_capability) == (None, "8.9")
        assert hopper.peak_allocated_bytes - ada.peak_allocated_bytes > 20 << 20  # cuBLAS's workspace
        assert any("Ada" in w and "not measured" in w for w in ada.warnings)
        assert not any("not measured" in w for w in hopper.warnings)
        assert {i.certainty for i in ada.items if i.category in ("activations", "workspace")} == {"derived"}
        assert ada.fit
        assert ada.fit.headroom_bytes == ada.fit.capacity_bytes - ada.device_bytes


def test_a_session_reads_a_model_once(tmp_path: Path) -> None:
    session, name = Session(), folder(tmp_path, LLAMA)
    first = session.estimate(name, Request(ctx=64))
    (tmp_path / "config.json").unlink()
    assert session.estimate(name, Request(ctx=64)) == first
    (tmp_path / "other").mkdir()
    for _ in range(2):  # a failure is remembered, too
        with pytest.raises(HfvramError) as caught:
            session.estimate(str(tmp_path / "other"), Request())
        assert caught.value.kind == "no_config"
        folder(tmp_path / "other", LLAMA)


def test_unknown_is_refused_or_bounded(tmp_path: Path) -> None:
    name = folder(tmp_path, {**LLAMA, "model_type": "martian"}, {"a": ("BF16", (10, 10))})
    with pytest.raises(HfvramError) as caught:
        hfvram.estimate(name)
    assert caught.value.kind == "unknown_architecture"
    e = hfvram.estimate(name, allow_unknown=True, ctx=64)
    assert e.model.parameters == 100
    assert e.weights_bytes == 200
    assert e.cache_bytes == 4 * 2 * 4 * 32 * 2 * 63
    assert any("'martian'" in w and "full attention" in w for w in e.warnings)
    # one question in which it is allowed does not make it allowed in the next
    session = Session()
    session.estimate(name, Request(allow_unknown=True))
    with pytest.raises(HfvramError):
        session.estimate(name, Request())


def test_what_is_bad_stays_bad(tmp_path: Path) -> None:
    name = folder(tmp_path, {**LLAMA, "hidden_size": "256"})
    with pytest.raises(HfvramError) as caught:
        hfvram.estimate(name, allow_unknown=True)
    assert caught.value.kind == "bad_config"


def test_taken_is_the_same_road() -> None:
    model = understand(read_checkpoint("gpt2", offline=True), Request())
    for request in (Request(ctx=100), Request(ctx=1000, batch=4, padding=True), Request(phase="prefill", dtype="fp16")):
        assert taken(model, request) == Session().estimate("gpt2", request, offline=True).device_bytes


def test_a_batch_without_padding_says_what_padding_would_add(tmp_path: Path) -> None:
    name = folder(tmp_path, LLAMA)
    e = hfvram.estimate(name, ctx=4096, batch=4)
    assert any("--padding" in w for w in e.warnings)
    assert hfvram.estimate(name, ctx=4096, batch=4, padding=True).device_bytes > e.device_bytes
    for options in ({"batch": 1}, {"batch": 4, "padding": True}):
        assert not any("--padding" in w for w in hfvram.estimate(name, ctx=4096, **options).warnings)


@pytest.mark.parametrize(("kernels", "other"), [("fused", "without"), ("fallback", "with ")])
def test_mamba_says_what_its_kernels_are_worth(kernels: str, other: str) -> None:
    e = hfvram.estimate("state-spaces/mamba-130m-hf", offline=True, kernels=kernels)
    (said,) = [w for w in e.warnings if "--kernels" in w]
    assert said.startswith(other)


def test_a_gpu_makes_a_verdict(tmp_path: Path) -> None:
    name = folder(tmp_path, LLAMA)
    e = hfvram.estimate(name, ctx=512, gpu="H100", recommend=True)
    assert e.fit is not None
    assert e.fit.fits
    assert e.fit.capacity_bytes - e.device_bytes == e.fit.headroom_bytes
    assert e.fit.max_ctx == 8192
    assert any("H100" in w for w in e.warnings)  # the most common of several was taken
    assert e.recommended
    assert all(r.capacity_bytes >= e.device_bytes for r in e.recommended)


def test_the_same_as_json_and_back(tmp_path: Path) -> None:
    e = hfvram.estimate(folder(tmp_path, LLAMA), ctx=512, gpu="24GB")
    again = json.loads(json.dumps(e.to_dict()))
    assert Request.from_dict(again["request"]) == e.request
    assert sum(i["bytes"] for i in again["items"]) == again["peak_allocated_bytes"]


def test_an_answer_takes_milliseconds() -> None:
    """SPEC: 300 requests a second, the model once read."""
    session = Session()
    session.estimate("mistralai/Mixtral-8x7B-v0.1", Request(ctx=4096), offline=True)
    start = time.process_time()
    for ctx in range(5000, 5050):
        session.estimate("mistralai/Mixtral-8x7B-v0.1", Request(ctx=ctx), offline=True)
    assert (time.process_time() - start) / 50 < 0.02  # six times what it takes on one idle core


def test_training_without_torch_is_answered_by_formula_and_says_what_would_be_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = hfvram.estimate("Qwen/Qwen3-0.6B", offline=True, mode="train", ctx=512)
    assert found.method == "formula"
    assert found.gradients_bytes == 2 * found.model.parameters
    assert any("hfvram[exact]" in warning for warning in found.warnings)


def test_a_strangers_name_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is asked by anyone: what lies on its machine is neither read nor told from what does not."""
    name = folder(tmp_path, LLAMA)
    monkeypatch.chdir(tmp_path.parent)
    stranger = Session(local=False)
    for text in (name, f"{name}/config.json", "./" + tmp_path.name, "~", "/nowhere", "../x"):
        with pytest.raises(HfvramError, match=r"^[^ ]+ is no Hub id: expected ORG/NAME, ORG/NAME@REVISION$") as raised:
            stranger.estimate(text, Request(), offline=True)
        assert raised.value.kind == "not_found"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert stranger.estimate("gpt2", Request(), offline=True).model.source == "catalogue"
    with pytest.raises(HfvramError) as raised:
        stranger.estimate("Qwen/Qwen3-8B", Request(engine="vllm", draft=name), offline=True)
    assert raised.value.kind == "not_found"
