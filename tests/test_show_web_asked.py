"""A question from the form or the address: what it asks, its link, and what a stranger may not ask."""

from urllib.parse import parse_qsl

import pytest

from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.show.web.asked import FORM, Asked, from_form, from_line, from_query
from hfvram.show.web.page import in_controls

DEFAULTS = dict(zip(FORM, ("inference", "", "", "auto", "transformers", ""), strict=True))


def test_the_empty_form_asks_what_the_command_line_asks() -> None:
    assert from_form("gpt2", "", DEFAULTS, local_gpu=False).request == Request()


@pytest.mark.parametrize(
    "asked",
    [
        Asked("a/b"),
        Asked("a/b@main", {"ctx": "8k", "batch": "4", "gpu": "RTX 4090", "quant": "nf4"}),
        Asked("a/b", {"mode": "train", "gradient_checkpointing": True, "gpus": "4", "fsdp": "full_shard"}),
        Asked("a/b", {"mode": "lora", "lora_targets": "q_proj,v_proj", "double_quant": False, "revision": "v1.0"}),
        Asked("a/b", {"engine": "vllm", "requests": "512x2048,16x32768", "gpu_memory_utilization": "0.95"}),
        Asked("x&y=z #<b>", {"gpu": "24 GB & more"}),
    ],
    ids=lambda a: a.query,
)
def test_link_and_controls_ask_the_same_again(asked: Asked) -> None:
    again = from_query(dict(parse_qsl(asked.query, keep_blank_values=True)), local_gpu=False)
    assert again
    assert (again.model, again.request, again.source) == (asked.model, asked.request, asked.source)
    model, *values, more = in_controls(again)
    typed = from_form(model, more, dict(zip(FORM, values, strict=True)), local_gpu=False)
    assert (typed.model, typed.request, typed.source) == (asked.model, asked.request, asked.source)


def test_a_control_shows_only_what_it_has() -> None:
    asked = Asked("a/b", {"mode": "dream", "engine": "abacus", "quant": "Q4_K_M"})
    assert in_controls(asked) == ("a/b", "inference", "", "", "Q4_K_M", "transformers", "", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trust_remote_code", "true"),
        ("token", "hf_x"),
        ("offline", "true"),
        ("plot", "/etc/x.png"),
        ("from", "/etc/passwd"),
        ("colour", "red"),
        ("gpu", "local"),
        ("gpu", "Local"),
        ("ctx", "9" * 3000),
    ],
)
def test_what_a_stranger_may_not_ask(name: str, value: str) -> None:
    with pytest.raises(HfvramError) as raised:
        from_query({"model": "a/b", name: value}, local_gpu=False)
    assert raised.value.kind == "usage"


@pytest.mark.parametrize(
    "line", ["--json", "--token x", "--trust-remote-code", "'", "a/b", "--nope", "--from x", "x" * 3000]
)
def test_a_line_that_can_not_be(line: str) -> None:
    with pytest.raises(HfvramError) as raised:
        from_form("a/b", line, DEFAULTS, local_gpu=True)
    assert raised.value.kind == "usage"
    assert "\n" not in raised.value.message


def test_ones_own_gpu_is_asked_on_ones_own_machine() -> None:
    assert from_query({"model": "a/b", "gpu": "local"}, local_gpu=True) == Asked("a/b", {"gpu": "local"})
    assert from_query({"ctx": "8k"}, local_gpu=True) is None
    assert from_line("--lora-r 8 --no-double-quant") == {"lora_r": "8", "double_quant": False}
