import pytest

from hfvram.errors import HfvramError
from hfvram.read.gguf_files import models, only_gguf, pick, projectors, quantization

FILES = frozenset(
    {
        "README.md", "config.json", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_XL.gguf", "m-IQ4_XS.gguf",
        "m-Q8_0/m-Q8_0-00001-of-00002.gguf", "m-Q8_0/m-Q8_0-00002-of-00002.gguf", "BF16/m-BF16.gguf",
        "mmproj-F16.gguf", "m.imatrix.gguf", "m-Q2_K-00001-of-00002.gguf",
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "files"),
    [
        ("Q4_K_M", ("m-Q4_K_M.gguf",)),
        ("q4_k_s", ("m-Q4_K_S.gguf",)),
        ("m-IQ4_XS.gguf", ("m-IQ4_XS.gguf",)),
        ("UD-Q4_K_XL", ("m-UD-Q4_K_XL.gguf",)),
        ("Q4_K_XL", ("m-UD-Q4_K_XL.gguf",)),
        ("BF16", ("BF16/m-BF16.gguf",)),
        ("m-BF16.gguf", ("BF16/m-BF16.gguf",)),
        ("m-Q8_0-00002-of-00002.gguf", ("m-Q8_0/m-Q8_0-00001-of-00002.gguf", "m-Q8_0/m-Q8_0-00002-of-00002.gguf")),
        ("Q8_0", ("m-Q8_0/m-Q8_0-00001-of-00002.gguf", "m-Q8_0/m-Q8_0-00002-of-00002.gguf")),
    ],
)
def test_a_name_or_a_quantization_picks(asked: str, files: tuple[str, ...]) -> None:
    assert pick(FILES, asked, "a/m") == files


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (None, "usage", "--file picks one of BF16, IQ4_XS, Q2_K, Q4_K_M, Q4_K_S, Q8_0, UD-Q4_K_XL"),
        ("Q5_K_M", "usage", "no GGUF files for --file Q5_K_M: valid are BF16"),
        ("Q4_K", "usage", "no GGUF files"),
        ("m", "usage", "several GGUF files"),
        ("Q2_K", "no_config", "1 of the 2 parts"),
    ],
)
def test_else_what_there_is_is_listed(asked: str | None, kind: str, words: str) -> None:
    with pytest.raises(HfvramError) as caught:
        pick(FILES, asked, "a/m")
    assert caught.value.kind == kind
    assert words in caught.value.message


def test_projectors_and_what_quantizing_leaves_are_no_models() -> None:
    assert projectors(FILES) == ("mmproj-F16.gguf",)
    assert not any("mmproj" in stem or "imatrix" in stem for stem in models(FILES))
    with pytest.raises(HfvramError) as caught:
        pick({"mmproj-F16.gguf"}, None, "a/m")
    assert caught.value.kind == "no_config"


def test_quantizations_in_names() -> None:
    names = ["gpt-oss-20b-mxfp4", "gpt-oss-20b-MXFP4_MOE", "Qwen3-8B.i1-IQ2_XXS", "TQ1_0/x", "llama-7b-f16", "Q8-model"]
    assert [quantization(n) for n in names] == ["MXFP4", "MXFP4_MOE", "IQ2_XXS", "TQ1_0", "F16", "Q8"]


def test_where_gguf_is_all_there_is() -> None:
    assert only_gguf(FILES)
    assert not only_gguf({*FILES, "model.safetensors"})
    assert not only_gguf({"config.json"})
