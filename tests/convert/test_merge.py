"""Merging into the base weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from helpers import assert_unchanged, dense_config, fingerprint, task_config, token_config
from models import batch, llama
from rank_experts import inject_rank_experts, merge_rank_experts, unmerge_rank_experts, use_task
from rank_experts.layers import adapted_layers


@pytest.fixture
def model():
    return inject_rank_experts(llama(), task_config()).eval()


def test_merging_refuses_before_anything_changes(model):
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"q_proj: adapter 'default' routes by task; .*one of \['cola', 'mnli', 'rte'\]"
    ):
        merge_rank_experts(model)
    with pytest.raises(ValueError, match=r"Task 'rtte' is unknown.*nearest is 'rte'"):
        merge_rank_experts(model, task="rtte")
    assert_unchanged(model, before)
    model = inject_rank_experts(llama(), token_config())
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"has no exact static form.*save_rank_experts.*export_lora"):
        merge_rank_experts(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="has no rank-expert adapters"):
        merge_rank_experts(llama())


def test_safe_merge_refuses_what_is_not_finite(model):
    layers = [layer for _, layer in adapted_layers(model)]
    with torch.no_grad():
        layers[-1].rank_experts["default"].B.fill_(float("inf"))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="gives non-finite weights"):
        merge_rank_experts(model, task="rte", safe_merge=True)
    assert_unchanged(model, before)


def test_a_merged_model_refuses_another_task(model):
    inputs = batch("llama", labels=False)
    merge_rank_experts(model, task="rte")
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, task_ids="rte").logits, expected)
    for other in ("cola", ["rte", "cola", "rte", "rte"], torch.tensor([2, 2, 1, 2])):
        with pytest.raises(ValueError, match=r"merged for task 'rte' and called for '(cola|mnli)'"):
            model(**inputs, task_ids=other)
    unmerge_rank_experts(model)
    model(**inputs, task_ids="cola")


def test_one_task_needs_no_name():
    model = inject_rank_experts(llama(), task_config(tasks=["only"])).eval()
    expected = model(**batch("llama")).logits
    merge_rank_experts(model)
    torch.testing.assert_close(model(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_to_and_fro_restores_every_bit(dtype):
    model = inject_rank_experts(llama().to(dtype), task_config()).eval()
    weights = {path: layer.base_layer.weight.clone() for path, layer in adapted_layers(model)}
    for _ in range(100):
        for task in ("rte", "cola"):
            merge_rank_experts(model, task=task)
            unmerge_rank_experts(model)
    assert all(torch.equal(layer.base_layer.weight, weights[path]) for path, layer in adapted_layers(model))


@pytest.mark.parametrize("config", [task_config, dense_config])
def test_pefts_verbs_merge_too(config):
    inputs = batch("llama")
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    task = {"task_ids": "mnli"} if config is task_config else {}
    expected = model(**inputs, **task).logits
    if task:
        with pytest.raises(ValueError, match="routes by task"):
            model.merge_and_unload()
        with use_task(model, "mnli"):
            model.merge_adapter()
    else:
        model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(**({"task": "mnli"} if task else {}))
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(llama())
    assert [type(m) for m in merged.modules()] == [type(m) for m in llama().modules()]
    assert merged.__dict__.keys() <= llama().__dict__.keys()
    assert merged.state_dict().keys() == llama().state_dict().keys()


def test_disabling_a_merged_adapter_restores_the_base(model):
    inputs = batch("llama")
    merge_rank_experts(model, task="rte")
    for _, layer in adapted_layers(model):
        layer.enable_adapters(False)
    assert torch.equal(model(**inputs).logits, llama().eval()(**inputs).logits)
