"""Which source counts a model's parameters, what is said where two disagree, dtypes, adapters, pipelines."""

from dataclasses import replace
from typing import Any

import pytest
from small import LLAMA

from hfvram.errors import HfvramError
from hfvram.model.identify import identify, identify_components, needs_headers
from hfvram.model.infer import infer
from hfvram.read.checkpoint import Adapter, Checkpoint, StoredTensor

# embedding and head 2 · 1000 · 256; a layer 2 · 256² + 2 · 256 · 128 + 3 · 256 · 512 + 2 · 256; the last norm
PARAMETERS = 512_000 + 2 * (131_072 + 65_536 + 393_216 + 512) + 256


def stored(config: dict[str, Any] = LLAMA, dtype: str = "BF16") -> tuple[StoredTensor, ...]:
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    params = (p for p in infer(config).all_params if p.kind != "buffer")
    return tuple(StoredTensor(p.name, dtype, p.shape, size * p.numel) for p in params)


def checkpoint(config: dict[str, Any] = LLAMA, **facts: Any) -> Checkpoint:
    return Checkpoint(**{"id": "a/b", "source": "local", "config": config, **facts})


def test_a_configuration_alone_is_counted_in_closed_form() -> None:
    m = identify(checkpoint())
    assert (m.parameters, m.parameters_from, m.warnings) == (PARAMETERS, "closed form", ())


def test_headers_lead() -> None:
    m = identify(checkpoint(tensors=stored()))
    assert (m.parameters, m.parameters_from, m.warnings) == (PARAMETERS, "headers", ())


def test_headers_that_disagree_are_told() -> None:
    m = identify(checkpoint(tensors=(*stored(), StoredTensor("more.weight", "BF16", (10, 10), 200))))
    assert (m.parameters, m.parameters_from) == (PARAMETERS + 100, "headers")
    (warning,) = m.warnings
    assert f"{PARAMETERS + 100:,}" in warning
    assert f"{PARAMETERS:,}" in warning
    assert m.architecture.parameters == PARAMETERS  # what is built, and so what stands in memory


def test_layers_beyond_the_last_are_told() -> None:
    m = identify(checkpoint(tensors=(*stored(), StoredTensor("model.layers.2.x.weight", "BF16", (10, 10), 200))))
    assert m.parameters == PARAMETERS
    assert "100 stored parameters" in m.warnings[0]


def test_the_hubs_own_count_is_one_of_headers() -> None:
    m = identify(checkpoint(source="hub", parameters_by_dtype={"BF16": PARAMETERS - 64, "F32": 64}))
    assert (m.parameters, m.parameters_from) == (PARAMETERS, "headers")


@pytest.mark.parametrize(
    ("facts", "needed"),
    [
        ({"parameters_by_dtype": {"BF16": PARAMETERS}}, False),
        ({"parameters_by_dtype": {"I32": PARAMETERS // 8, "F16": 100}}, True),
        ({"parameters_by_dtype": {"I32": 7}, "source": "catalogue"}, False),
        ({"parameters_by_dtype": {"I32": 7}, "tensors": ()}, False),
        ({}, False),
    ],
)
def test_when_headers_have_to_be_read(facts: dict[str, Any], needed: bool) -> None:
    assert needs_headers(checkpoint(**{"source": "hub", **facts}), infer(LLAMA)) is needed


def test_the_catalogue_names_itself_and_may_not_be_wrong() -> None:
    m = identify(checkpoint(source="catalogue", parameters_by_dtype={"BF16": PARAMETERS}))
    assert (m.parameters, m.parameters_from) == (PARAMETERS, "catalogue")
    with pytest.raises(HfvramError):
        identify(checkpoint(source="catalogue", parameters_by_dtype={"BF16": PARAMETERS + 1}))


@pytest.mark.parametrize(
    ("config", "facts", "dtype"),
    [
        ({"torch_dtype": "float16"}, {"tensors": stored()}, "fp16"),
        ({"dtype": "bfloat16"}, {"tensors": stored(dtype="F32")}, "bf16"),
        ({}, {"tensors": stored()}, "bf16"),
        ({}, {"tensors": stored(dtype="F16")}, "fp16"),
        ({}, {"parameters_by_dtype": {"F16": PARAMETERS}}, "fp16"),
        ({}, {}, "fp32"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "fp16"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "bf16"),
    ],
)
def test_dtypes(config: dict[str, Any], facts: dict[str, Any], dtype: str) -> None:
    assert identify(checkpoint({**LLAMA, **config}, **facts)).architecture.dtype == dtype


def test_a_quantized_checkpoint_stands_as_it_is_stored() -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    tensors = (StoredTensor("x.qweight", "I32", (8, 64), 2048), StoredTensor("x.scales", "F16", (1, 64), 128))
    assert identify(checkpoint(config, tensors=tensors)).architecture.stored_sizes == (2048, 128)
    assert identify(checkpoint(tensors=stored())).architecture.stored_sizes == ()


def test_an_adapter_is_added() -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    m = identify(checkpoint(adapter=Adapter("me/lora", config, None)))
    assert m.parameters == PARAMETERS + 2 * 2 * (256 + 256)
    assert m.architecture.active_parameters == m.parameters


def test_a_pipeline_is_its_components() -> None:
    unet = checkpoint({"_class_name": "UNet2DConditionModel"}, tensors=(StoredTensor("w", "F16", (10, 10), 200),))
    vae = checkpoint({"_class_name": "AutoencoderKL"})  # neither known nor are there headers
    whole = replace(checkpoint({}), components={"text_encoder": checkpoint(), "unet": unet, "vae": vae})
    m = identify_components(whole)
    assert [(name, part.parameters) for name, part in m.components] == [("text_encoder", PARAMETERS), ("unet", 100)]
    assert any("vae is left out" in w for w in m.warnings)
    assert any("UNet2DConditionModel: weights alone" in w for w in m.warnings)
    with pytest.raises(HfvramError) as caught:
        identify_components(replace(whole, components={"vae": vae}))
    assert caught.value.kind == "unknown_architecture"
    broken = checkpoint({**LLAMA, "hidden_size": -1})
    with pytest.raises(HfvramError) as caught:
        identify_components(replace(whole, components={"text_encoder": checkpoint(), "bad": broken}))
    assert caught.value.kind == "bad_config"
