"""Pipelines: each component an estimate, and their sum; folders as diffusers and sentence-transformers write them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub import safetensors

import hfvram
from hfvram.errors import HfvramError
from hfvram.memory.device import device_bytes
from hfvram.model.infer import infer

CLIP = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 77,
    "torch_dtype": "float16",
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None, name: str = "model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        file = safetensors(tensors)
        (folder / f"{name}.safetensors").write_bytes(file.head + bytes(file.size - len(file.head)))


@pytest.fixture
def diffusion(tmp_path: Path) -> Path:
    """A text encoder that is known, a UNet and a decoder by their headers, a scheduler and a tokenizer."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    params = (p for p in infer(CLIP).all_params if p.kind != "buffer")
    write(tmp_path / "text_encoder", CLIP, {p.name: ("F16", p.shape) for p in params})
    name = "diffusion_pytorch_model"
    write(
        tmp_path / "unet", {"_class_name": "UNet2DConditionModel"}, {"a": ("F16", (100, 100)), "b": ("F16", (7,))}, name
    )
    write(tmp_path / "vae", {"_class_name": "AutoencoderKL"}, {"c": ("F32", (50, 50))}, name)
    for part in ("scheduler", "tokenizer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}_config.json").write_text("{}")
    return tmp_path


def test_a_diffusion_pipeline_is_the_sum_of_its_components(diffusion: Path) -> None:
    e = hfvram.estimate(str(diffusion))
    parts = dict(e.components)
    assert set(parts) == {"text_encoder", "unet", "vae"}
    clip = infer(CLIP).parameters
    assert [parts[n].model.parameters for n in ("text_encoder", "unet", "vae")] == [clip, 10_007, 2500]
    assert [parts[n].weights_bytes for n in ("text_encoder", "unet", "vae")] == [2 * clip, 20_014, 10_000]
    assert e.model.parameters == clip + 12_507
    assert e.weights_bytes == 2 * clip + 30_014
    assert e.cache_bytes == 0
    assert sum(i.bytes for i in e.items) == e.peak_allocated_bytes
    assert e.peak_allocated_bytes >= max(p.peak_allocated_bytes for p in parts.values())
    assert e.peak_allocated_bytes <= sum(p.peak_allocated_bytes for p in parts.values())
    assert e.device_bytes == device_bytes(e.peak_reserved_bytes)  # the context once
    assert e.interval.low_bytes < e.device_bytes < e.interval.high_bytes
    assert {i.name.partition(": ")[0] for i in e.items if i.category == "weights"} == {"text_encoder", "unet", "vae"}
    assert any("weights alone" in w for w in e.warnings)
    assert len(e.to_dict()["components"]) == 3


def test_a_component_without_weights_or_code_is_left_out_and_told(diffusion: Path) -> None:
    (diffusion / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    e = hfvram.estimate(str(diffusion))
    assert [n for n, _ in e.components] == ["text_encoder", "unet"]
    assert any("vae is left out" in w for w in e.warnings)


def test_a_pipeline_has_a_verdict(diffusion: Path) -> None:
    e = hfvram.estimate(str(diffusion), gpu="24GB")
    assert e.fit is not None
    assert e.fit.fits
    assert e.fit.headroom_bytes == 24 * 10**9 - e.device_bytes
    small = hfvram.estimate(str(diffusion), gpu="100MiB")
    assert small.fit is not None
    assert not small.fit.fits


def test_hostile_components(diffusion: Path) -> None:
    write(diffusion / "text_encoder", {**CLIP, "hidden_size": "64"})
    with pytest.raises(HfvramError) as caught:
        hfvram.estimate(str(diffusion))
    assert caught.value.kind == "bad_config"


def test_sentence_transformers(tmp_path: Path) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    params = (p for p in infer(BERT).all_params if p.kind != "buffer")
    write(tmp_path, BERT, {p.name: ("F32", p.shape) for p in params})
    write(tmp_path / "1_Pooling", {"word_embedding_dimension": 64})
    dense = {"linear.weight": ("F32", (32, 64)), "linear.bias": ("F32", (32,))}
    write(tmp_path / "2_Dense", {"in_features": 64, "out_features": 32}, dense)
    e = hfvram.estimate(str(tmp_path))
    assert e.model.parameters == infer(BERT).parameters + 32 * 64 + 32
    assert e.weights_bytes == 4 * e.model.parameters
    assert e.request.phase == "encode"
