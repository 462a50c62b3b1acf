"""Tensors for an adapter that would make something else of them: refused, with the field's name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

import models
from helpers import TASKS, assert_unchanged, dense_config, fingerprint, task_config, token_config
from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.files.loading import read_config, restore_rank_experts
from rank_experts.layers import adapted_layers

NARROW = {"target_modules": ["q_proj", "v_proj"]}

# Each with the same tensors in name and shape.
DIFFERING = {
    "tasks": (task_config(), task_config(tasks=["mnli", "cola", "rte"])),
    "tasks, another": (task_config(), task_config(tasks=["cola", "mnli", "qnli"])),
    "rank_scaling": (task_config(), task_config(rank_scaling="none")),
    "pooling": (task_config(), task_config(pooling="last")),
    "contrastive_temperature": (task_config(), task_config(contrastive_temperature=0.5)),
    "alpha": (dense_config(), dense_config(alpha=16)),
    "alpha_pattern": (dense_config(), dense_config(alpha_pattern={"q_proj": 3})),
    "alpha_pattern, order": (
        dense_config(alpha_pattern={"q_proj": 3, "1.self_attn.q_proj": 5}),
        dense_config(alpha_pattern={"1.self_attn.q_proj": 5, "q_proj": 3}),
    ),
    "top_k": (token_config(), token_config(top_k=3)),
    "score_function": (token_config(), token_config(score_function="softmax")),
    "biased_gates": (token_config(), token_config(biased_gates=True)),
    "rank_pattern": (dense_config(), dense_config(rank_pattern={"q_proj": 4})),
}


def injected(config):
    return inject_rank_experts(models.llama(), RankExpertConfig(**(config.to_dict() | NARROW)))


@pytest.mark.parametrize("name", DIFFERING)
def test_a_config_that_computes_something_else_is_refused_by_its_field(name, tmp_path):
    saved, own = DIFFERING[name]
    save_rank_experts(injected(saved), tmp_path)
    model = injected(own)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"was saved with {name.split(',')[0]}="):
        restore_rank_experts(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", DIFFERING)
def test_peft_loads_nothing_else_into_an_adapter_that_the_model_has(name, tmp_path):
    saved, own = (RankExpertConfig(**(config.to_dict() | NARROW)) for config in DIFFERING[name])
    get_peft_model(models.llama(), saved).save_pretrained(tmp_path)
    model = get_peft_model(models.llama(), own)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"was saved with {name.split(',')[0]}="):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_unchanged(model, before)


def test_another_router_is_refused_even_where_its_tensors_have_the_same_names(tmp_path):
    save_rank_experts(injected(dense_config()), tmp_path)
    with pytest.raises(ValueError, match="was saved with router='dense'"):
        restore_rank_experts(injected(token_config(r=4)), tmp_path)


@pytest.mark.parametrize("way", ["restore", "peft"])
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (token_config, {"load_balance": "none", "balance_rate": 0.1, "balance_coef": 0.5, "dropout": 0.1}),
        (task_config, {"contrastive_coef": 0.0, "init_weights": True}),
        (dense_config, {"target_modules": r".*\.[qv]_proj", "revision": "main", "inference_mode": True}),
    ],
)
def test_what_a_training_may_change_is_not_refused(way, config, changes, tmp_path):
    first = get_peft_model(models.llama(), config(**NARROW))
    model = get_peft_model(models.llama(), config(**(NARROW | changes)))
    first.save_pretrained(tmp_path)
    if way == "peft":
        model.load_adapter(tmp_path, "default")
    else:
        restore_rank_experts(model, tmp_path)
    for name, tensor in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@given(st.permutations(TASKS), st.permutations(TASKS))
@settings(max_examples=12, deadline=None)
def test_tasks_in_another_order_never_load(tmp_path_factory, saved, own):
    folder = tmp_path_factory.mktemp("adapter")
    first, second = (injected(task_config(tasks=list(tasks))) for tasks in (saved, own))
    save_rank_experts(first, folder)
    if saved != own:
        with pytest.raises(ValueError, match=re.escape(f"was saved with tasks={list(saved)}")):
            restore_rank_experts(second, folder)
        return
    restore_rank_experts(second, folder)
    batch = models.batch("llama", size=3, labels=False)
    ids = torch.tensor([0, 1, 2])
    assert torch.equal(first.eval()(**batch, task_ids=ids).logits, second.eval()(**batch, task_ids=ids).logits)


@pytest.mark.parametrize("way", ["own", "peft"])
def test_the_first_pattern_that_matches_counts_after_loading_too(way, tmp_path):
    # In the alphabet's order the second would come first.
    config = dense_config(**NARROW, alpha_pattern={"q_proj": 3, "1.self_attn.q_proj": 5})
    model = get_peft_model(models.llama(), config)
    if way == "own":
        save_rank_experts(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    assert list(read_config(tmp_path).alpha_pattern) == ["q_proj", "1.self_attn.q_proj"]
    alphas = {
        path: layer.rank_experts["default"].settings.alpha for path, layer in adapted_layers(model.get_base_model())
    }
    for loaded in (
        load_rank_experts(models.llama(), tmp_path),
        PeftModel.from_pretrained(models.llama(), tmp_path).get_base_model(),
    ):
        assert {path: layer.rank_experts["default"].settings.alpha for path, layer in adapted_layers(loaded)} == alphas
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(fields) == sorted(fields)
