"""Where vLLM is, and what its engines get to see."""

import os
from pathlib import Path

import pytest
from lab import ROOT


@pytest.fixture(scope="session")
def vllm_python():
    chosen = os.environ.get("PEAGLE_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    assert Path(chosen).exists(), f"{chosen} does not exist: run `make test-vllm`"
    return chosen


@pytest.fixture(scope="session")
def environment():
    """Of engines: no network, and no more memory than a small machine can give."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    return {**os.environ, **ours}
