import pytest

from hfvram.read.completion import plausible


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("m/X-8x7B", ["m/X-8x7B-v0.1"], ["m/X-8x7B-v0.1"]),
        ("m/X", ["m/X-v1", "m/X-v0.1.2", "m/X-hf"], ["m/X-hf", "m/X-v0.1.2", "m/X-v1"]),
        ("m/X", ["m/X-v2-hf", "m/X-hf-v2", "m/X-hf-hf"], ["m/X-hf-v2", "m/X-v2-hf"]),
        ("M/x", ["m/X"], ["m/X"]),
        ("m/x", ["m/X-V1.0"], ["m/X-V1.0"]),
        ("m/X", ["m/X-Instruct", "m/X-Instruct-v0.1", "m/X-Chat", "m/X-it"], []),
        ("m/X", ["m/X-AWQ", "m/X-v0.1-GPTQ", "m/X-7B", "m/X2"], []),
        ("m/X", ["n/X-v1", "m/X"], []),
        ("X", ["m/X-v1"], []),
    ],
)  # fmt: skip
def test_completions(name: str, published: list[str], expected: list[str]) -> None:
    assert plausible(name, published) == expected
