"""Shared fixtures."""

from __future__ import annotations

import os

import pytest
import torch

# Tiny models are fastest on one thread, and the workers of pytest-xdist share the cores.
torch.set_num_threads(1)

# No test may wait for a hub that a machine cannot reach.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU the Triton kernels run under Triton's interpreter, which must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        slow = pytest.mark.skip(reason="takes minutes; run with make test-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    # What is shown once a process may be shown in every test. Imported here, after the environment is set.
    from rank_experts.messages import warn_once

    warn_once.cache_clear()
