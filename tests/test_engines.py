"""The two engines held together: one published configuration of every type, in every mode that has a formula.

`scripts/engines.py` compares more sizes, and docs/accuracy.md shows what it finds.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import engines

MODELS = engines.representatives()
MODES = {mode: sizes[0] for mode, sizes in engines.GRID.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_what_the_formula_says_the_models_own_code_does(kind: str) -> None:
    pytest.importorskip("torch")
    far = []
    for mode, options in MODES.items():
        found = engines.compare(kind, MODELS[kind], mode, options)
        assert not found.why.startswith("bug")
        if not found.why and abs(found.allocated) > engines.bound(kind, mode):
            far.append(found)
    assert not far


@pytest.mark.slow
def test_most_types_are_compared() -> None:
    """Of the types with a formula for inference nearly all train by formula, too."""
    pytest.importorskip("torch")
    trained = [k for k in MODELS if not engines.compare(k, MODELS[k], "train", MODES["train"]).why]
    assert len(trained) >= 46


def test_a_configuration_is_cut_to_its_first_layers() -> None:
    deep: dict[str, Any] = {"num_hidden_layers": 9, "layer_types": ["a", "b"] * 4 + ["c"], "first_k_dense_replace": 5}
    assert engines.cut(deep) == {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "a", "b"],
        "first_k_dense_replace": 5,
    }
