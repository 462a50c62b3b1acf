"""vLLM's own settings, for tests with a real one, and folders that many tests use."""

from __future__ import annotations

import importlib.util

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="session", autouse=True)
def _environment():
    """Small engines on the CPU, and no Triton interpreter in them."""
    if not HAS_VLLM:
        yield
        return
    patch = pytest.MonkeyPatch()
    patch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        patch.setenv(name, value)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The base model and adapters of every gate."""
    from vllm_models import make_all

    return make_all(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def expected(folder):
    """What transformers generates, by the adapter's name; each is computed once."""
    from vllm_models import PROMPTS, by_transformers

    found = {}

    def of(name):
        if name not in found:
            found[name] = by_transformers(folder, name, PROMPTS)
        return found[name]

    return of
