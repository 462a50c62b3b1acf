"""A sample of the architectures, the odd ones among them; `make architectures` tries all of them."""

from __future__ import annotations

import pytest

from architectures.check import check
from architectures.shrink import architectures

# What is odd: rows that are no examples in order, weights that are read instead of called, tuples as outputs, no
# embeddings, experts, shared weights, convolutions.
SAMPLE = [
    *("llama", "gpt2", "mixtral", "qwen3_moe", "llama4_text", "mamba", "falcon_h1", "bloom", "t5", "fsmt", "led"),
    *("xlnet", "longformer", "canine", "albert", "swinv2", "convnext", "segformer", "llava", "whisper"),
]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_an_architecture_works_or_is_refused(model_type):
    _, class_name = architectures()[model_type]
    found = check(model_type, class_name)
    assert found["verdict"] in ("works", "works with a limit", "refused"), found
