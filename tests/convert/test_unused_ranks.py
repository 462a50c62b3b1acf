"""Ranks that a LoRA does not use, an export's padding above all: an adapter that starts from it can train them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import TASKS, task_config
from models import batch, bert
from rank_experts import export_lora, inject_lora, inject_loras, inject_rank_experts, use_task
from rank_experts.convert.upcycle import split_by_svd
from rank_experts.layers import adapted_layers

TARGETS = {"target_modules": ["query", "value"]}


def padded(folder, zeros):
    """An exported LoRA of rank 8, of which `zeros` are filled up."""
    config = task_config(r=8 - zeros, rank_scaling="none", **TARGETS)
    model = inject_rank_experts(bert(), config).eval()
    for _, layer in adapted_layers(model):
        # Every task uses all ranks.
        layer.rank_experts["default"].gate_bias.data[-1] = 100.0
    export_lora(model, folder, task=TASKS[0], r=8)
    return model


def logits(model, **options):
    with torch.no_grad():
        return model.eval()(**batch("bert", labels=False), **options).logits


@pytest.mark.parametrize("zeros", [0, 1, 5])
@pytest.mark.parametrize("way", ["one", "several"])
def test_gradients_reach_every_expert(way, zeros, tmp_path):
    source = padded(tmp_path, zeros)
    # 4 of the experts active, or both blocks.
    model = (
        inject_lora(bert(), tmp_path, top_k=4) if way == "one" else inject_loras(bert(), {"a": tmp_path, "b": tmp_path})
    )
    with use_task(source, TASKS[0]):
        expected = logits(source)
    if way == "several":
        torch.testing.assert_close(logits(model), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    gradients = []
    for _ in range(2):
        # Every expert is chosen by some token.
        loss = 0.0
        for bias in range(2):
            for _, layer in adapted_layers(model):
                own = layer.rank_experts["default"].balance_bias
                own.copy_(torch.arange(len(own)).flip(0) if bias else torch.arange(len(own)))
            loss = loss + model(**batch("bert")).loss
        optimizer.zero_grad()
        loss.backward()
        adapters = [layer.rank_experts["default"] for _, layer in adapted_layers(model)]
        gradients.append([(adapter.A.grad.clone(), adapter.B.grad.clone()) for adapter in adapters])
        optimizer.step()
    for _, B in gradients[0]:
        assert (B.abs().amax(0) > 1e-9).all()
    for A, _ in gradients[1]:
        assert (A != 0).any(1).all()


@pytest.mark.parametrize("zeros", [1, 5, 8])
def test_what_is_not_used_changes_nothing_before_it_is_trained(zeros, tmp_path):
    source = padded(tmp_path, min(zeros, 7))
    if zeros == 8:
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        for name in tensors:
            tensors[name] = torch.zeros_like(tensors[name]) if "lora_B" in name else tensors[name]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        expected = logits(bert())
    else:
        with use_task(source, TASKS[0]):
            expected = logits(source)
    model = inject_lora(bert(), tmp_path)
    torch.testing.assert_close(logits(model), expected)
    for _, layer in adapted_layers(model):
        adapter = layer.rank_experts["default"]
        assert (adapter.A != 0).any(1).all()
        assert int((adapter.B == 0).all(0).sum()) == zeros


def test_singular_values_that_are_zero_are_zero():
    A, B = torch.randn(6, 9), torch.randn(7, 6)
    A[4:], B[:, 4:] = 0, 0
    own_A, own_B = split_by_svd(A, B)
    assert (own_A[4:] == 0).all()
    assert (own_B[:, 4:] == 0).all()
    torch.testing.assert_close(own_B @ own_A, B @ A)
