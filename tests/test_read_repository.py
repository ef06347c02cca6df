"""Folders on disk, which is also the test of `disk`."""

import json
import os
from pathlib import Path

import pytest
from hub import header_bytes

from hfvram.errors import HfvramError
from hfvram.read.disk import DiskFolder, list_files
from hfvram.read.repository import is_adapter, read_adapter, read_folder, read_tensor_table


def write(folder: Path, files: dict[str, object]) -> DiskFolder:
    """Bytes as they are, `{name: (dtype, shape)}` of tuples as safetensors, anything else as JSON."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif name.endswith(".safetensors"):
            head, data = header_bytes(value)  # type: ignore[arg-type]
            path.write_bytes(head + bytes(data))
        else:
            path.write_text(json.dumps(value))
    return DiskFolder("here", str(folder), list_files(str(folder)))


def kind_of(folder: DiskFolder, **options: str) -> str:
    with pytest.raises(HfvramError) as caught:
        read_folder(folder, **options)
    return caught.value.kind


W = {"w": ("BF16", (2, 3))}


def test_a_model(tmp_path: Path) -> None:
    files = {"config.json": {"model_type": "x"}, "generation_config.json": {"use_cache": False}, "model.safetensors": W}
    read = read_folder(write(tmp_path, files))
    assert (read.source, read.config, read.generation_config) == ("local", {"model_type": "x"}, {"use_cache": False})
    assert read.tensors is not None
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in read.tensors] == [("w", "BF16", (2, 3), 12)]
    assert read.path == str(tmp_path)


def test_a_configuration_alone(tmp_path: Path) -> None:
    read = read_folder(write(tmp_path, {"config.json": {}, "pytorch_model.bin": b"\0"}))
    assert (read.tensors, read.parameters_by_dtype, read.generation_config) == (None, None, None)


def test_shards_by_name_and_by_index(tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": {f"w{i}": ("F32", (i,))} for i in (1, 2)}
    read = read_folder(write(tmp_path / "name", {"config.json": {}, **shards}))
    assert read.tensors is not None
    assert [t.name for t in read.tensors] == ["w1", "w2"]
    stale = {f"model-0000{i}-of-00003.safetensors": {"old": ("F32", (9,))} for i in (1, 2, 3)}
    index = {"weight_map": {"w1": "model-00001-of-00002.safetensors", "w2": "model-00002-of-00002.safetensors"}}
    files = {"config.json": {}, **shards, **stale, "model.safetensors.index.json": index}
    assert read_folder(write(tmp_path / "index", files)).tensors == read.tensors


def test_shards_that_are_missing_are_told(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"config.json": {}, "model-00001-of-00002.safetensors": W, "model.safetensors.index.json": index}
    read = read_folder(write(tmp_path, files))
    assert read.tensors is None
    assert "names 1 files that are not there" in read.warnings[0]


def test_weights_that_could_be_several_are_told_and_picked(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": {}, "a.safetensors": W, "b.safetensors": {"v": ("U8", (7,))}})
    read = read_folder(folder)
    assert read.tensors is None
    assert "--file picks one" in read.warnings[0]
    picked = read_folder(folder, "b.safetensors")
    assert picked.tensors is not None
    assert picked.tensors[0].nbytes == 7
    assert kind_of(folder, file="c.safetensors") == "usage"
    assert kind_of(folder, file="../b.safetensors") == "usage"
    assert kind_of(folder, file="Q4_K_M") == "usage"


def test_unknown_dtypes_are_told(tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "fixtures" / "headers" / "newer-dtype.safetensors"
    read = read_folder(write(tmp_path, {"config.json": {}, "model.safetensors": fixture.read_bytes()}))
    assert read.warnings == ("stored with dtypes that are unknown here (F2_NEW): counted by their bytes",)


def test_modelopts_own_file_says_what_the_configuration_leaves_out(tmp_path: Path) -> None:
    quant = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    read = read_folder(write(tmp_path / "a", {"config.json": {}, "hf_quant_config.json": quant}))
    assert read.config["quantization_config"] == {
        "quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
    }  # fmt: skip
    own = {"quantization_config": {"quant_method": "fp8"}}
    assert read_folder(write(tmp_path / "b", {"config.json": own, "hf_quant_config.json": quant})).config == own


def test_a_diffusers_pipeline(tmp_path: Path) -> None:
    index = {
        "_class_name": "P", "_diffusers_version": "0.30",
        "unet": ["diffusers", "UNet"], "text_encoder": ["transformers", "C"],
        "scheduler": ["diffusers", "S"], "safety_checker": [None, None], "flag": True,
    }  # fmt: skip
    files = {
        "model_index.json": index, "unet/config.json": {"in": 4}, "unet/diffusion_pytorch_model.safetensors": W,
        "text_encoder/config.json": {"model_type": "clip_text_model"},
        "text_encoder/model.safetensors": {"t": ("F16", (5,))},
        "scheduler/scheduler_config.json": {}, "safety_checker/config.json": {}, "extra.safetensors": W,
    }  # fmt: skip
    read = read_folder(write(tmp_path, files))
    assert sorted(read.components) == ["text_encoder", "unet"]
    assert read.components["unet"].config == {"in": 4}
    tensors = read.components["text_encoder"].tensors
    assert tensors is not None
    assert tensors[0].nbytes == 10
    assert kind_of(write(tmp_path / "none", {"model_index.json": index})) == "no_config"


def test_sentence_transformers(tmp_path: Path) -> None:
    def module(path: str, kind: str) -> dict[str, str]:
        return {"path": path, "type": f"sentence_transformers.models.{kind}"}

    pooled = {
        "modules.json": [module("", "Transformer"), module("1_Pooling", "Pooling")],
        "1_Pooling/config.json": {"dim": 8},
    }
    plain = read_folder(
        write(tmp_path / "a", {**pooled, "config.json": {"model_type": "bert"}, "model.safetensors": W})
    )
    assert (plain.config, plain.components) == ({"model_type": "bert"}, {})
    old = {
        "modules.json": [module("0_Transformer", "Transformer")],
        "0_Transformer/config.json": {"model_type": "bert"},
    }
    assert read_folder(write(tmp_path / "b", old)).config == {"model_type": "bert"}
    dense = {
        "modules.json": [module("", "Transformer"), module("2_Dense", "Dense")], "config.json": {"model_type": "bert"},
        "2_Dense/config.json": {"in_features": 8}, "2_Dense/model.safetensors": {"linear.weight": ("F32", (8, 8))},
    }  # fmt: skip
    read = read_folder(write(tmp_path / "c", dense))
    assert sorted(read.components) == ["2_Dense", "transformer"]
    assert read.components["2_Dense"].config == {"in_features": 8}
    hostile = {
        "modules.json": [module("../../etc", "Transformer"), 3, {"path": 7}],
        "config.json": {"model_type": "bert"},
    }
    assert read_folder(write(tmp_path / "d", hostile)).config == {"model_type": "bert"}


def test_adapters_are_told_from_models(tmp_path: Path) -> None:
    files = {"adapter_config.json": {"peft_type": "LORA", "r": 8}, "adapter_model.safetensors": {"a": ("F32", (8, 4))}}
    folder = write(tmp_path / "a", files)
    assert is_adapter(folder.files)
    adapter = read_adapter(folder)
    assert adapter.config["r"] == 8
    assert adapter.tensors is not None
    assert adapter.tensors[0].nbytes == 128
    assert not is_adapter(write(tmp_path / "b", {**files, "config.json": {}, "model.safetensors": W}).files)
    assert is_adapter(write(tmp_path / "c", {**files, "config.json": {}}).files)


def test_nothing_to_read(tmp_path: Path) -> None:
    assert kind_of(write(tmp_path / "a", {"README.md": b""})) == "no_config"
    assert kind_of(write(tmp_path / "b", {"model.Q4_K_M.gguf": b"GGUF"})) == "bad_header"
    assert kind_of(write(tmp_path / "c", {"config.json": b"[]"})) == "bad_config"
    assert kind_of(write(tmp_path / "d", {"config.json": b" " * 10_000_001})) == "bad_config"
    assert kind_of(write(tmp_path / "e", {"config.json": {}, "model.safetensors": b"12345"})) == "bad_header"
    assert kind_of(write(tmp_path / "f", {"config.json": {}, "modules.json": b"{"})) == "bad_config"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": {}, "model.safetensors": W})
    os.unlink(tmp_path / "model.safetensors")  # between the listing and the reading
    assert kind_of(folder) == "io"
    with pytest.raises(HfvramError) as caught:
        list_files(str(tmp_path / "absent"))
    assert caught.value.kind == "io"


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    os.symlink("/dev/zero", tmp_path / "model.safetensors")
    assert list_files(str(tmp_path)) == frozenset()


def test_the_tensor_table_alone(tmp_path: Path) -> None:
    table = read_tensor_table(write(tmp_path, {"config.json": {}, "model.safetensors": W}))
    assert table is not None
    assert table[0].name == "w"
