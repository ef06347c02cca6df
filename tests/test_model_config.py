"""Configurations read with suspicion: types, limits, aliases, and whose default holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.model.config import MAX_LAYERS, MAX_SIZE, Config
from hfvram.model.families.defaults import class_of, known, prefix_of, section, type_of_class


def refused(read: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        read(*args, **kwargs)
    assert caught.value.kind == "bad_config"
    return caught.value.message


def test_sizes_are_whole_numbers_within_reason() -> None:
    config = Config({"a": 3, "float": 4.0, "text": "3", "half": 2.5, "yes": True, "negative": -1, "huge": MAX_SIZE + 1})
    assert config.size("a") == 3
    assert config.size("float") == 4
    for name in ("text", "half", "yes", "negative", "huge"):
        assert name in refused(config.size, name)
    assert "absent" in refused(config.size, "absent")
    assert config.size("absent", default=7) == 7
    assert refused(Config({"n": MAX_LAYERS + 1}).layers, "n")
    assert config.layers("absent", default=0) == 0


def test_a_number_of_a_million_digits_is_not_printed() -> None:
    message = refused(Config({"hidden_size": 10**5000}).size, "hidden_size")
    assert len(message) < 200


def test_other_types() -> None:
    config = Config({"text": "x", "one": 1, "list": ["a", "b"], "object": {"k": 1}, "number": 0.5, "off": False})
    assert config.text("text", default="") == "x"
    assert config.strings("list") == ["a", "b"]
    assert config.number("number", default=1.0) == 0.5
    assert not config.flag("off", default=True)
    assert config.flag("one")
    inner = config.section("object")
    assert inner is not None
    assert inner.size("k") == 1
    assert config.section("absent") is config.items("absent") is config.strings("absent") is None
    for read, name in (
        (config.section, "text"),
        (config.strings, "text"),
        (config.items, "object"),
        (config.flag, "text"),
    ):
        assert name in refused(read, name)
    assert refused(config.text, "one", default="")
    assert refused(config.number, "text", default=0.0)
    assert refused(Config({"list": ["a", 1]}).strings, "list")
    assert refused(Config({"list": [0] * (MAX_LAYERS + 1)}).items, "list")


def test_sizes_that_do_not_divide() -> None:
    assert Config({}).divided("hidden_size", 4096, 32) == 128
    assert "4097" in refused(Config({}).divided, "hidden_size", 4097, 32)


def test_a_null_stands_and_an_absent_key_takes_the_familys_default() -> None:
    """MistralConfig has a window of 4096; a file that says null means none."""
    assert known(Config({"model_type": "mistral"})).get("sliding_window") == 4096
    assert known(Config({"model_type": "mistral", "sliding_window": None})).get("sliding_window") is None
    assert known(Config({"model_type": "mistral", "sliding_window": 8})).get("sliding_window") == 8


def test_the_familys_own_names_of_keys() -> None:
    gpt2 = known(Config({"model_type": "gpt2", "n_embd": 1600}))
    assert gpt2.size("hidden_size") == gpt2.size("n_embd") == 1600
    assert gpt2.size("num_hidden_layers") == 12  # GPT2Config's n_layer


def test_the_file_leads_over_any_default_of_another_name() -> None:
    config = Config({"b": 2}, defaults={"a": 1, "b": 3})
    assert config.size("a", "b") == 2


def test_sections_have_their_own_familys_defaults() -> None:
    config = known(Config({"model_type": "llava", "text_config": {"model_type": "qwen2"}}))
    assert section(config, "text_config").size("vocab_size") == 151936
    # An absent section is what LlavaConfig puts there: not CLIPVisionConfig's own defaults.
    assert section(config, "vision_config").size("image_size") == 336
    assert known(Config({"model_type": "clip_vision_model"})).get("image_size") in (224, None)
    assert "audio_config" in refused(section, config, "audio_config")


def test_classes() -> None:
    config = known(Config({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}))
    assert class_of(config) == "LlavaForConditionalGeneration"
    assert class_of(config, "LlavaModel") == "LlavaModel"
    neox = known(Config({"model_type": "gpt_neox", "architectures": ["GPTNeoXForSequenceClassification"]}))
    assert class_of(neox) == "GPTNeoXForSequenceClassification"
    assert prefix_of(neox, class_of(neox)) == "gpt_neox."
    assert prefix_of(neox, "GPTNeoXModel") == ""
    assert type_of_class("MixtralForCausalLM") == "mixtral"
    assert type_of_class("NoSuchForCausalLM") is None


@contextmanager
def refusals_in(kinds: set[str]) -> Iterator[None]:
    """Collects the kinds of our own errors; any other goes on."""
    try:
        yield
    except HfvramError as error:
        kinds.add(error.kind)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4))


@given(values)
def test_any_value_is_read_or_refused(value: Any) -> None:
    config = Config({"key": value})
    kinds: set[str] = set()
    for read in (config.size, config.layers, config.flag, config.items, config.strings, config.section):
        with refusals_in(kinds):
            read("key")
    with refusals_in(kinds):
        config.text("key", default="")
    with refusals_in(kinds):
        config.number("key", default=0.0)
    assert kinds <= {"bad_config"}
