"""Which layers became parameters, as transformers and PEFT say it."""

import pytest

from hfvram.model.fused_targets import FUSED, MIXTRAL, QWEN


@pytest.mark.slow
def test_types_and_names_are_those_of_peft() -> None:
    pytest.importorskip("peft")
    from peft.utils import transformers_weight_conversion as theirs

    names = theirs._MOE_TARGET_MODULE_MAPPING
    assert names == {"mixtral": MIXTRAL, "qwen2_moe": QWEN}
    patterns = theirs._MODEL_TO_CONVERSION_PATTERN
    assert {t: names[p] for t, p in patterns.items() if p in names} == FUSED
