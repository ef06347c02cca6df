import pytest

from hfvram.read.weights import Weights, find_weights, shards_of_index


def numbered(stem: str, count: int, have: int | None = None) -> list[str]:
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, (have or count) + 1)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["config.json", "pytorch_model.bin"], Weights()),
        (["model.safetensors"], Weights(("model.safetensors",))),
        # transformers takes the whole file before the shards
        (["model.safetensors", *numbered("model", 2)], Weights(("model.safetensors",))),
        (numbered("model", 3), Weights(tuple(numbered("model", 3)))),
        # Mistral publishes each model twice, the second time for its own library
        ([*numbered("model", 2), "consolidated.safetensors"], Weights(tuple(numbered("model", 2)))),
        ([*numbered("model", 2), *numbered("consolidated", 2)], Weights(tuple(numbered("model", 2)))),
        (["consolidated.safetensors"], Weights(("consolidated.safetensors",))),
        # left behind by an earlier upload: only the index can say
        (
            [*numbered("model", 2), *numbered("model", 3), "model.safetensors.index.json"],
            Weights(index="model.safetensors.index.json"),
        ),
        (
            [*numbered("model", 3, have=2), "model.safetensors.index.json"],
            Weights(index="model.safetensors.index.json"),
        ),
        (numbered("model", 3, have=2), Weights()),
        (["gptq_model-4bit-128g.safetensors"], Weights(("gptq_model-4bit-128g.safetensors",))),
        (["a.safetensors", "b.safetensors"], Weights(choices=("a.safetensors", "b.safetensors"))),
        (["adapter_model.safetensors", "optimizer.safetensors", "original/model.safetensors"], Weights()),
        (["model.fp16.safetensors", "model.safetensors"], Weights(("model.safetensors",))),
    ],
)
def test_which_files_are_the_weights(files: list[str], expected: Weights) -> None:
    assert find_weights(files) == expected


def test_weights_of_a_component() -> None:
    files = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/model.safetensors",
    ]
    assert find_weights(files, "unet/") == Weights(("unet/diffusion_pytorch_model.safetensors",))
    assert find_weights(files) == Weights()


def test_an_index_names_only_what_is_there() -> None:
    index = {"weight_map": {"a": "x.safetensors", "b": "../../secret", "c": 7, "d": "x.safetensors"}}
    assert shards_of_index(index, "sub/model.safetensors.index.json", {"sub/x.safetensors"}) == (
        ("sub/x.safetensors",),
        1,
    )
    assert shards_of_index({"weight_map": []}, "i", set()) == ((), 0)
    assert shards_of_index({}, "i", set()) == ((), 0)
