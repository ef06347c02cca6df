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
            "/opt/bin/vllm serve a/b --kv-cache-dtype fp8_e5m2 --quantization hqq --cpu-offload-gb 4 extra",
            "a/b",
            {"engine": "vllm", "kv_dtype": "fp8"},
            ("--quantization hqq", "--cpu-offload-gb 4", "extra"),
        ),
        (
            "python -m sglang.launch_server --model-path a/b --tp 2 --context-length 8192 --disable-cuda-graph",
            "a/b",
            {"engine": "sglang", "tp": "2", "ctx": "8192", "enforce_eager": True},
            (),
        ),
        (
            """vllm serve a/b --speculative-config '{"method": "mtp"}' -q compressed-tensors""",
            "a/b",
            {"engine": "vllm", "draft": "mtp", "quant": "auto"},
            (),
        ),
        (
            """vllm serve a/b --speculative-config='{"model": "c/d"}' --speculative-config='{"method": "ngram"}'""",
            "a/b",
            {"engine": "vllm", "draft": "c/d"},
            ("""--speculative-config={"method": "ngram"}""",),
        ),
        (
            "python -m sglang.launch_server --model a/b --speculative-algorithm NEXTN",
            "a/b",
            {"engine": "sglang", "draft": "mtp"},
            (),
        ),
        ("vllm serve a/b --max-model-len", "a/b", {"engine": "vllm", "ctx": ""}, ()),
        (
            "./build/bin/llama-server -m models/x-Q4_K_M.gguf -c 8192 -ngl 99 -ub 1024 -fa on --port 8080 -t 8",
            "models/x-Q4_K_M.gguf",
            {
                "engine": "llama.cpp",
                "ctx": "8192",
                "n_gpu_layers": "99",
                "max_num_batched_tokens": "1024",
                "max_num_seqs": 4,
            },
            (),
        ),
        (
            "llama-server -hf a/b:Q8_0 --ctx-size 32768 -np 4 --n-gpu-layers -1 -ctk q8_0 -ctv q8_0 -ot exps=CPU -nkvo",
            "a/b",
            {
                "engine": "llama.cpp",
                "file": "Q8_0",
                "ctx": 8192,
                "batch": 4,
                "kv_dtype": "q8_0",
                "override_tensor": "exps=CPU",
            },
            ("-nkvo",),
        ),
        (
            "llama-cli -m x.gguf --n-cpu-moe 12 -ctk q8_0 -fa off",
            "x.gguf",
            {"engine": "llama.cpp", "n_cpu_moe": "12", "kv_dtype": "q8_0", "attention": "eager"},
            (),
        ),
        (
            "llama-server -m x.gguf -np 8 -kvu --swa-full -cmoe -ctv q4_0",
            "x.gguf",
            {"engine": "llama.cpp", "max_num_seqs": 8, "swa_full": True, "n_cpu_moe": 10**6},
            ("-ctv q4_0 beside -ctk f16: keys and values are answered alike",),
        ),
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
