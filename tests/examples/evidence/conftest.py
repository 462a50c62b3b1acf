"""The experiments of examples/benchmarks/evidence as modules."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EVIDENCE = Path(__file__).parents[3] / "examples/benchmarks/evidence"


@pytest.fixture
def evidence(monkeypatch):
    """Import one of the experiments' modules by name."""
    monkeypatch.syspath_prepend(str(EVIDENCE))
    return importlib.import_module
