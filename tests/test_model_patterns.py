"""Patterns of module names: as published, against Python's own `re`, and hostile."""

import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.model.patterns import chosen, expression

Q = "model.layers.10.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "pattern", "yes"),
    [
        ("lm_head.weight", "lm_head", True),
        ("model.lm_head.weight", "lm_head", True),
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1", True),
        (Q, "model.layers.1", False),
        (Q, "self_attn", True),
        (Q, "attn", False),
        (Q, "self_attn.q_proj", True),
        (Q, Q, True),
        (Q, "", False),
        ("model.layers.10.mlp.gate_proj.weight", "gate", False),
        ("model.layers.10.mlp.gate.weight", "mlp.gate", True),
        ("model.layers.10.mlp.gate.weight", "model.layers.*.mlp.gate", True),
        ("model.layers.10.mlp.up.weight", "model.layers.*.mlp.gate", False),
        ("model.layers.10.mlp.gate_proj.weight", "model.layers.*.mlp.gate", False),
        ("model.layers.10.mlp.gate_proj.weight", "model.layers.*.mlp.gate*", True),
        ("model.layers.10.mlp.gates.gate.weight", "mlp*gate", True),
        ("model.vision_tower.layers.0.x.weight", "model.vision_tower*", True),
        ("model.layers.0.x.weight", "*", True),
        ("model.layers.0.x.weight", "*layers", True),
        ("model.layers.0.mlp.gate.weight", r"re:.*mlp\.gate\..*", True),
        ("model.layers.0.mlp.gate_proj.weight", r"re:.*mlp\.gate\..*", False),
        ("lm_head.weight", "re:.*lm_head", True),
        ("model.layers.0.x.weight", "re:layers", False),
        ("model.layers.0.x.weight", "re:(", False),
        (Q, "re:" + "(" * 5000, False),
        (Q, "re:a{99999999999}", False),
        ("model.layers.0.mlp.experts.0.w", r"re:^(?!.*experts).*", False),
        ("model.layers.0.mlp.up.w", r"re:^(?!.*experts).*", True),
        ("model.a+b.weight", "a+b", True),
        ("model.aab.weight", "a+b", False),
    ],
)
def test_patterns(name: str, pattern: str, yes: bool) -> None:
    assert chosen((pattern,))(name) is yes
    assert chosen(("something.else", "other*", "re:none", pattern))(name) is yes


alphabet = "ab.1_"
atoms = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-b1]", "_", "^", "$", r"\b", "a|b", ""])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda x: f"(?:{x[0]}|{x[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0,}"])).map(
            lambda x: f"({x[0]}){x[1]}"
        ),
        inner.map(lambda x: f"(?={x})"),
        inner.map(lambda x: f"(?!{x})"),
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(expressions, st.text(alphabet, max_size=8))
@example("(a|ab)(c|bcd)*", "abcd")
def test_regular_expressions_mean_what_they_mean_to_python(text: str, name: str) -> None:
    found = expression(text)
    assert found is not None
    assert found.is_whole(name) is (re.fullmatch(text, name) is not None)
    assert found.begins(name) is (re.match(text, name) is not None)
    slow = replace(found, quick=None)
    assert slow.is_whole(name) is found.is_whole(name)
    assert slow.begins(name) is found.begins(name)


@pytest.mark.parametrize(
    "text", ["(", "a{99999999999}", "(" * 5000, r"(a)\1", "(?i)a", "(?<=a)b", "a" * 3000, "x{5000}"]
)
def test_what_is_no_expression_or_is_not_understood(text: str) -> None:
    assert expression(text) is None


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(([a-z._0-9]+)+)+!",
        "re:" + "(a|a)*" * 100 + "!",
        "re:" + ".*" * 500 + "!",
        "re:(.*)*(.*)*(.*)*!",
        "re:" + "(" * 60 + "x" + ")*" * 60 + "!",
        "re:(.{0,1000}){1000}!",
        "*" * 30 + "!",
        "*" * 10_000 + "!",
        "e*" * 1000,
        "*".join("eo" * 20) + "!",
    ],
)
def test_hostile_patterns_are_over_at_once(pattern: str) -> None:
    start = time.process_time()
    assert chosen((pattern,))("model.language_model.layers.10.self_attn.feed_forward_proj.weight") is False
    assert time.process_time() - start < 2


@pytest.mark.slow
def test_a_pattern_that_takes_too_long_in_all_is_refused() -> None:
    means = chosen(tuple("re:" + ".*" * 100 + f"!{i}" for i in range(100)))
    start = time.process_time()
    names = [f"model.language_model.layers.{i}.self_attn.feed_forward_proj.weight" for i in range(10_000)]
    with pytest.raises(HfvramError) as caught:
        list(map(means, names))
    assert caught.value.kind == "bad_config"
    assert time.process_time() - start < 5


def test_published_expressions_take_pythons_own_road() -> None:
    published = [r".*mlp\.gate$", r".*lm_head", r"vision_tower.*", r".*\.layers\.(0|1)\..*", r"^(?!.*experts).*"]
    assert all(e is not None and e.quick for e in map(expression, published))
    assert all(e is not None and not e.quick for e in map(expression, ["(a+)+", "(a|b)*", ".*.*.*.*", "(ab)*"]))


def test_hundreds_of_patterns_are_quick() -> None:
    """As many as FP8 checkpoints list: every projection of the attention, for thousands of parameters."""
    names = tuple(f"model.layers.{i}.self_attn.{n}_proj" for i in range(200) for n in "qkvo")
    start = time.process_time()
    means = chosen((*names, "lm_head", "model.vision*"))
    assert all(means(f"{name}.weight") for name in names)
    assert not any(means(f"model.layers.{i}.mlp.{n}_proj.weight") for i in range(1000) for n in "abcd")
    assert time.process_time() - start < 1
