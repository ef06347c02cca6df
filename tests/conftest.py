"""What every test of reading needs: a cache folder of its own, no token of this machine, no network but loopback."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HF_HOME, and nothing else of the ecosystem's environment; retries wait for hundredths of a second."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr("hfvram.read.hub.FIRST_WAIT_SECONDS", 0.01)
    return home
