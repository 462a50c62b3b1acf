"""Merging is exact: the same outputs in every dtype, the same bits after unmerging, no trace after unloading."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import get_peft_model

from helpers import TASKS, assert_unchanged, dense_config, fingerprint, task_config, token_config
from models import MODELS, batch, llama
from rank_experts import inject_rank_experts, merge_rank_experts, unmerge_rank_experts, use_task
from rank_experts.layers import adapted_layers

SHAPES = ("llama", "t5", "bert", "gpt2")
# Of the difference's norm to the logits' norm. Merging rounds every weight to the base's dtype once more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def logits(model, name):
    return model(**batch(name)).logits.double()


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_merged_task_has_the_same_logits(name, dtype):
    base = MODELS[name]().to(dtype).eval()
    config = task_config(alpha=12)
    model = inject_rank_experts(copy.deepcopy(base), config, autocast_adapter_dtype=dtype != torch.float16).eval()
    for task in TASKS:
        with use_task(model, task):
            expected = logits(model, name)
        assert distance(logits(base, name), expected) > 3 * TOLERANCE[dtype], "the adapter does too little"
        merge_rank_experts(model, task=task)
        assert distance(logits(model, name), expected) <= TOLERANCE[dtype]
        unmerge_rank_experts(model)
        with use_task(model, task):
            assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_hundred_merges_leave_every_bit(name, dtype):
    base = MODELS[name]().to(dtype).eval()
    bits = {key: value.clone() for key, value in base.state_dict().items()}
    model = inject_rank_experts(base, task_config(target_modules="all-linear"))
    for task in itertools.islice(itertools.cycle(("cola", "rte")), 100):
        merge_rank_experts(model, task=task)
        unmerge_rank_experts(model)
    kept = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in bits.items())


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "PeftModel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_unloading_leaves_no_trace(name, dtype, wrapped):
    base = MODELS[name]().to(dtype).eval()
    plain = fingerprint(base)
    config = task_config(modules_to_save=["classifier"] if name == "bert" else None)
    if wrapped:
        model = get_peft_model(copy.deepcopy(base), config).eval()
        with use_task(model, "mnli"):
            expected = logits(model, name)
        merged = model.merge_and_unload(task="mnli")
    else:
        model = inject_rank_experts(copy.deepcopy(base), config).eval()
        with use_task(model, "mnli"):
            expected = logits(model, name)
        merged = merge_rank_experts(model, task="mnli", unload=True)
        assert merged is model
    assert distance(logits(merged, name), expected) <= TOLERANCE[dtype]
    traces = fingerprint(merged)
    for key in ("modules", "forwards", "adapters", "attributes"):
        assert traces[key] == plain[key], key
    assert traces["tensors"].keys() == plain["tensors"].keys()
    assert not any(type(module).__module__.startswith(("rank_experts", "peft")) for module in merged.modules())


def test_unloading_keeps_the_trained_module():
    model = inject_rank_experts(MODELS["bert"](), dense_config(modules_to_save=["classifier"])).eval()
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.fill_(0.25)
    merge_rank_experts(model, unload=True)
    assert bool((model.classifier.weight == 0.25).all())


def test_unloading_is_refused_where_merging_is():
    for config, arguments in ((token_config(), {}), (task_config(), {}), (task_config(), {"task": "colla"})):
        model = inject_rank_experts(llama(), config)
        before = fingerprint(model)
        with pytest.raises(ValueError, match=r"static form|routes by task|unknown"):
            merge_rank_experts(model, unload=True, **arguments)
        assert_unchanged(model, before)
    with pytest.raises(TypeError, match="merge_and_unload"):
        merge_rank_experts(get_peft_model(llama(), dense_config()), unload=True)


def test_merging_another_task_on_top_is_refused():
    model = inject_rank_experts(llama(), task_config()).eval()
    merge_rank_experts(model, task="cola")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"merged for task 'cola'.*unmerge_rank_experts"):
        merge_rank_experts(model, task="rte")
    assert_unchanged(model, before)
    merge_rank_experts(model, task="cola")
    assert_unchanged(model, before)


def test_two_adapters_merge_into_their_sum():
    model = inject_rank_experts(llama().double(), dense_config(target_modules=["q_proj"])).eval()
    inject_rank_experts(model, task_config(target_modules=["q_proj", "up_proj"]), "tasks")
    for _, layer in adapted_layers(model):
        layer.set_adapter(["default", "tasks"])
    with use_task(model, "rte"):
        expected = logits(model, "llama")
    merge_rank_experts(model, task="rte")
    assert distance(logits(model, "llama"), expected) <= 1e-12
    unmerge_rank_experts(model)
    with use_task(model, "rte"):
        assert torch.equal(logits(model, "llama"), expected)


def test_a_weight_that_another_module_shares_is_not_merged():
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = inject_rank_experts(base, dense_config(target_modules=["q_proj", "lm_head"])).eval()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens.*export_lora"):
        merge_rank_experts(model)
    assert_unchanged(model, before)


def test_a_merged_model_moves_and_copies():
    model = inject_rank_experts(llama(), task_config()).eval()
    weights = {path: layer.base_layer.weight.clone() for path, layer in adapted_layers(model)}
    merge_rank_experts(model, task="cola")
    copied = copy.deepcopy(model)
    unmerge_rank_experts(copied)
    assert all(torch.equal(layer.base_layer.weight, weights[path]) for path, layer in adapted_layers(copied))
    assert not all(torch.equal(layer.base_layer.weight, weights[path]) for path, layer in adapted_layers(model))
    model.double()
    unmerge_rank_experts(model)
    assert all(torch.equal(layer.base_layer.weight, weights[path].double()) for path, layer in adapted_layers(model))
