"""An adapter that no training call reaches is named, once."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from gates import GATES, batch, config
from helpers import dense_config
from mixtures import expert_config
from rank_experts import inject_rank_experts
from rank_experts.calls.first_calls import CALLS
from rank_experts.layers import adapted_layers


class Reads(nn.Module):
    """Calls one layer, reads the weight of another, and uses a third from a given call on."""

    def __init__(self, late: int = 10**6):
        super().__init__()
        self.called, self.read, self.late = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.first, self.calls = late, 0

    def forward(self, x):
        self.calls += 1
        x = F.linear(self.called(x), self.read.weight)
        return self.late(x) if self.calls > self.first else x


def train(model, inputs, calls: int) -> list[str]:
    """The warnings about unused adapters of some training calls."""
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            outputs = model(**inputs)
            (outputs.loss if hasattr(outputs, "loss") else outputs.sum()).backward()
    return [str(warning.message) for warning in caught if "took no part" in str(warning.message)]


@pytest.mark.parametrize("gate", GATES)
def test_adapters_that_are_never_used_are_named_once(gate):
    model = inject_rank_experts(Reads(), config(gate, target_modules=["called", "read", "late"]))
    inputs = {"x": torch.randn(4, 6)} | ({"task_ids": torch.tensor([0, 1, 2, 0])} if gate == "task" else {})
    assert train(model, inputs, CALLS - 1) == []
    (said,) = train(model, inputs, 1)
    assert f"first {CALLS} training calls of Reads: read, late." in said
    assert train(model, inputs, 2 * CALLS) == []
    assert next(layer for _, layer in adapted_layers(model)).scope.first_calls is None


def test_what_has_its_turn_in_time_is_used():
    model = inject_rank_experts(Reads(late=CALLS - 1), dense_config(target_modules=["called", "late"]))
    assert train(model, {"x": torch.randn(4, 6)}, 2 * CALLS) == []


def test_evaluation_and_forwards_without_gradients_do_not_count():
    model = inject_rank_experts(Reads(), dense_config(target_modules=["called", "read"]))
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            for _ in range(CALLS):
                model(torch.randn(4, 6))
    assert len(train(model, {"x": torch.randn(4, 6)}, CALLS)) == 1


def test_frozen_and_inactive_adapters_are_not_missed():
    model = inject_rank_experts(Reads(), dense_config(target_modules=["called"]), "first")
    inject_rank_experts(model, dense_config(target_modules=["read"]), "second")
    for path, layer in adapted_layers(model):
        layer.set_adapter("first")
        layer.requires_grad_(path == "called")
    assert train(model, {"x": torch.randn(4, 6)}, CALLS) == []


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_models_of_transformers_use_all_of_theirs(name, checkpointed):
    model = inject_rank_experts(models.MODELS[name](), dense_config(target_modules=models.TARGETS[name]))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert train(model, batch("dense", name), CALLS) == []


def test_experts_without_tokens_are_no_unused_ones():
    model = inject_rank_experts(models.mixtral(), expert_config("token"))
    inputs = {name: value[:1, :2] for name, value in models.batch("llama").items()}
    assert train(model, inputs, CALLS) == []


def test_compiled_blocks_are_not_judged():
    model = Reads()
    model = inject_rank_experts(model, dense_config(target_modules=["called", "read"]))
    model.called.compile(backend="eager")
    assert train(model, {"x": torch.randn(4, 6)}, CALLS) == []
