"""Tables of rotary positions: rows by hand, and which layers share one."""

import pytest

from hfvram.model import rope
from hfvram.model.config import Config
from hfvram.model.infer import infer
from hfvram.model.rope import RopeTable
from hfvram.read.catalogue import lookup


@pytest.mark.parametrize(
    ("scaling", "rows"),
    [
        ({}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_type": "linear", "factor": 8.0}, 32_768),
        ({"type": "yarn", "factor": 40, "original_max_position_embeddings": 1024}, 40_960),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, 16_384),
        ({"type": "longrope", "original_max_position_embeddings": 1024}, 5120),
    ],
)
def test_rotary_tables(scaling: dict[str, object], rows: int) -> None:
    assert rope.positions(Config(scaling), 4096) == rows


def tables(name: str) -> tuple[RopeTable, ...]:
    entry = lookup(name)
    assert entry is not None
    return rope.tables(infer(dict(entry.config)), entry.config)


def test_layers_share_a_table_and_windowed_ones_may_have_their_own() -> None:
    assert tables("meta-llama/Llama-3.1-8B-Instruct") == (RopeTable(131_072, 128),)
    assert tables("microsoft/phi-2") == (RopeTable(2048, 32),)  # 0.4 of a head of 80
    assert tables("openai-community/gpt2") == ()
    # Gemma-3: windowed layers by a base of their own, full ones stretched by 8.
    assert set(tables("google/gemma-3-27b-it")) == {RopeTable(131_072, 128), RopeTable(8 * 131_072, 128)}
    # DeepSeek's YaRN: 4096 · 40 positions, in fp32.
    assert tables("deepseek-ai/DeepSeek-V2-Lite") == (RopeTable(163_840, 64, fp32=True),)
