"""Lines that start an engine, as people have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.engine_line import parse


@pytest.mark.parametrize(
    ("line", "model", "options", "unknown"),
    [
        ("vllm serve a/b", "a/b", {"engine": "vllm"}, ()),
        (
            "vllm serve --model a/b --enforce-eager -tp 4",
            "a/b",
            {"engine": "vllm", "enforce_eager": True, "tp": "4"},
            (),
        ),
        (
            "python3 -m vllm.entrypoints.openai.api_server --model a/b --dtype half --max_num_seqs=64 --port 80",
            "a/b",
            {"engine": "vllm", "dtype": "fp16", "max_num_seqs": "64"},
            (),
        ),
        (
            "/opt/bin/vllm serve a/b --kv-cache-dtype fp8_e5m2 --quantization awq --cpu-offload-gb 4 extra",
            "a/b",
            {"engine": "vllm", "kv_dtype": "fp8"},
            ("--quantization awq", "--cpu-offload-gb 4", "extra"),
        ),
        (
            "python -m sglang.launch_server --model-path a/b --tp 2 --context-length 8192 --disable-cuda-graph",
            "a/b",
            {"engine": "sglang", "tp": "2", "ctx": "8192", "enforce_eager": True},
            (),
        ),
        ("vllm serve a/b --max-model-len", "a/b", {"engine": "vllm", "ctx": ""}, ()),
    ],
)
def test_lines(line: str, model: str, options: dict[str, object], unknown: tuple[str, ...]) -> None:
    found = parse(line)
    assert (found.model, dict(found.options), found.unknown) == (model, options, unknown)


@given(st.text(max_size=60))
def test_any_text_is_understood_or_a_usage_error(text: str) -> None:
    for line in (text, f"vllm serve {text}", f"sglang serve {text}"):
        try:
            parse(line)
        except HfvramError as raised:
            error = raised
        else:
            continue
        assert error.kind == "usage"
