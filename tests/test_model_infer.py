"""From any configuration to its architecture, or a refusal by name. The 259 real ones are in fixtures/configs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.model.config import Config
from hfvram.model.families import MODULES
from hfvram.model.families.defaults import known
from hfvram.model.infer import infer

CONFIGS = Path(__file__).parent.parent / "fixtures/configs"
FACTS = [json.loads(line) for line in (CONFIGS / "facts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fact", FACTS, ids=[fact["id"] for fact in FACTS])
def test_real_configurations_are_counted_exactly(fact: dict[str, Any]) -> None:
    """Parameters of the class that transformers 5.17 builds, embeddings tied as it ties them."""
    architecture = infer(fact["config"])
    assert (architecture.class_name, architecture.parameters) == (fact["class"], fact["parameters"])
    assert 0 < architecture.active_parameters <= architecture.parameters


def test_an_unknown_type_of_a_known_class_is_read_as_that_class() -> None:
    """Kimi-K2 is of type kimi_k2, and its repo's code a copy of DeepSeek-V3's."""
    own = next(fact["config"] for fact in FACTS if fact["config"]["model_type"] == "deepseek_v3")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    copied = infer({**own, **code, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]})
    assert copied.parameters == infer(own).parameters
    assert copied.warnings[0].endswith("read as deepseek_v3, by the name of its class DeepseekV3ForCausalLM")
    for unlike in ({"architectures": ["KimiForCausalLM"]}, {"auto_map": None}, {"auto_map": {"AutoModel": 1}}):
        with pytest.raises(HfvramError, match="'kimi_k2' is not known"):
            infer({**own, **code, "model_type": "kimi_k2", **unlike})


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import json, sys; from hfvram.model.infer import infer\n"
        "for line in open(sys.argv[1]): infer(json.loads(line)['config'])\n"
        "print(*(m for m in ('torch', 'transformers', 'numpy', 'httpx', 'huggingface_hub') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONFIGS / "facts.jsonl")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def refusal(values: Any) -> HfvramError:
    with pytest.raises(HfvramError) as caught:
        infer(values)
    return caught.value


def test_remote_code_is_refused_by_name() -> None:
    error = refusal(
        {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "auto_map": {"AutoModel": "x"}}
    )
    assert error.kind == "unknown_architecture"
    assert "'baichuan'" in error.message
    assert "remote code" in error.message
    assert "remote code" not in refusal({"model_type": "martian"}).message


@pytest.mark.parametrize(
    "model_type", ["qwen", "chatglm", "kimi_k2", "RefinedWebModel", "deepseek_ref", "rwkv5", "internlm2", "mimo"]
)
def test_types_that_only_look_like_known_ones_are_refused(model_type: str) -> None:
    error = refusal({"model_type": model_type, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32})
    assert error.kind == "unknown_architecture"
    assert repr(model_type) in error.message


def test_a_class_stands_in_for_a_missing_type() -> None:
    assert infer({"architectures": ["MixtralForCausalLM"]}).model_type == "mixtral"
    assert "Martian" in refusal({"architectures": ["MartianForCausalLM"]}).message
    # state-spaces/mamba-130m: neither one nor the other.
    assert refusal({"d_model": 768, "n_layer": 24, "vocab_size": 50277}).kind == "unknown_architecture"


@pytest.mark.parametrize("values", [[], "llama", None, 7])
def test_what_is_no_object(values: Any) -> None:
    assert refusal(values).kind == "bad_config"


def test_the_class_asked_for_leads() -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert infer(config, "MistralModel").parameters == 7_241_732_096 - 32000 * 4096


def test_quantization_is_set() -> None:
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    quantized = infer({"model_type": "gpt_oss", "quantization_config": section})
    assert (quantized.quantization, quantized.unquantized) == ("mxfp4", ("lm_head",))
    assert infer({"model_type": "gpt_oss"}).quantization is None


def test_whether_generate_keeps_a_cache() -> None:
    """MptConfig has `use_cache: false`; a generation configuration decides where there is one."""
    assert infer({"model_type": "llama"}).generates_cache
    assert not infer({"model_type": "llama", "use_cache": False}).generates_cache
    assert infer({"model_type": "llama", "use_cache": False}, generation={"eos_token_id": 2}).generates_cache
    assert not infer({"model_type": "llama"}, generation={"use_cache": False}).generates_cache
    assert not infer({"model_type": "mpt"}).generates_cache


def test_a_file_without_sizes_gets_a_warning() -> None:
    assert "llama" in infer({"model_type": "llama"}).warnings[0]
    assert infer({"model_type": "llama", "hidden_size": 4096}).warnings == ()
    assert infer({"model_type": "gpt2", "n_embd": 768}).warnings == ()


ALL_TYPES = [model_type for types in MODULES.values() for model_type in types]
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10**12),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(SIZES), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(ALL_TYPES), st.data())
def test_hostile_values_are_answered_or_refused(model_type: str, data: st.DataObject) -> None:
    """Whatever stands in a key that the family reads, the answer is an architecture or one of two errors."""
    others = (
        "layer_types",
        "text_config",
        "vision_config",
        "rope_scaling",
        "partial_rotary_factor",
        "quantization_config",
    )
    keys = {*known(Config({"model_type": model_type})).defaults, *SIZES, *others} - {"model_type"}
    values = data.draw(st.dictionaries(st.sampled_from(sorted(keys)), junk, max_size=4))
    try:
        infer({**values, "model_type": model_type})
    except HfvramError as error:
        kind = error.kind
    else:
        kind = "bad_config"
    assert kind in ("bad_config", "unknown_architecture")


@pytest.mark.slow
def test_defaults_are_those_of_transformers() -> None:
    """scripts/write_family_defaults.py would write what stands in the package."""
    pytest.importorskip("transformers")
    script = Path(__file__).parent.parent / "scripts/write_family_defaults.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False, capture_output=True).returncode == 0
