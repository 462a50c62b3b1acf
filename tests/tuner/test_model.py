"""Injection into seven architectures: forward, backward, generate, save, load, merge; and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import CONFIGS, assert_unchanged, fingerprint, task_config, token_config
from models import CAUSAL, MODELS, TARGETS, batch, bert, gpt2, llama
from rank_experts import (
    RankExpertConfig,
    inject_rank_experts,
    load_rank_experts,
    merge_rank_experts,
    save_rank_experts,
    unmerge_rank_experts,
    use_task,
)
from rank_experts.layers import adapted_layers
from rank_experts.layers.linear import RankExpertLinear
from rank_experts.tuner.targets import find_targets


def task_ids(kind, size=4):
    return {"task_ids": torch.arange(size) % 3} if kind == "task" else {}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name, kind, tmp_path):
    base = MODELS[name]().eval()
    inputs, ids = batch(name), task_ids(kind)
    fresh = inject_rank_experts(MODELS[name]().eval(), CONFIGS[kind](target_modules=TARGETS[name], init_weights=True))
    assert type(fresh) is type(base)
    with torch.no_grad():  # attention picks its kernel by what requires a gradient
        before = base(**inputs).logits
        assert torch.equal(fresh(**inputs, **ids).logits, before), "a new adapter must not change a bit"

    model = inject_rank_experts(base, CONFIGS[kind](target_modules=TARGETS[name]))
    assert not torch.allclose(model(**inputs, **ids).logits, before)

    model.train()
    model(**inputs, **ids).loss.backward()
    adapter = [(n, p) for n, p in model.named_parameters() if "rank_expert" in n]
    assert adapter
    without = [n for n, p in adapter if p.grad is None or not p.grad.any()]
    # Mixtral's and T5's last layers may leave a router of an unused path without one; no other parameter.
    assert not without, without
    assert all(p.grad is None for n, p in model.named_parameters() if "rank_expert" not in n)
    model.eval()

    expected = model(**inputs, **ids).logits
    save_rank_experts(model, tmp_path)
    loaded = load_rank_experts(MODELS[name]().eval(), tmp_path)
    assert torch.equal(loaded(**inputs, **ids).logits, expected)
    through_peft = PeftModel.from_pretrained(MODELS[name]().eval(), tmp_path).eval()
    assert torch.equal(through_peft(**inputs, **ids).logits, expected)

    if name in CAUSAL or name == "t5":
        prompt = batch(name, labels=False)
        plain = model.generate(**prompt, **ids, max_new_tokens=4, do_sample=False)
        assert len(plain) == 4
        beams = model.generate(**prompt, **ids, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
        assert len(beams) == 8

    _check_merge(model, kind, inputs)


def _check_merge(model, kind, inputs):
    if kind in ("token", "blocks"):
        before = fingerprint(model)
        with pytest.raises(ValueError, match="routes by token"):
            merge_rank_experts(model)
        assert_unchanged(model, before)
        return
    weights = {path: layer.base_layer.weight.clone() for path, layer in adapted_layers(model)}
    task = "rte" if kind == "task" else None
    if task:
        with use_task(model, task):
            expected = model(**inputs).logits
    else:
        expected = model(**inputs).logits
    merge_rank_experts(model, task=task)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    unmerge_rank_experts(model)
    for path, layer in adapted_layers(model):
        assert torch.equal(layer.base_layer.weight, weights[path])


@pytest.mark.parametrize("kind", CONFIGS)
def test_get_peft_model_equals_injection(kind):
    inputs, ids = batch("llama"), task_ids(kind)
    torch.manual_seed(5)
    injected = inject_rank_experts(llama(), CONFIGS[kind]()).eval()
    wrapped = get_peft_model(llama(), CONFIGS[kind](task_type="CAUSAL_LM")).eval()
    wrapped.base_model.model.load_state_dict(injected.state_dict())
    assert torch.equal(wrapped(**inputs, **ids).logits, injected(**inputs, **ids).logits)


def test_rank_and_alpha_patterns_reach_the_layer():
    model = inject_rank_experts(llama(), token_config(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 32}))
    layers = dict(adapted_layers(model))
    prefix = "model.layers.0.self_attn."
    assert layers[prefix + "q_proj"].rank_experts["default"].A.shape[0] == 8
    assert layers[prefix + "k_proj"].rank_experts["default"].A.shape[0] == 16
    assert layers[prefix + "v_proj"].rank_experts["default"].scale == 32 / 4


def test_several_adapters_add_up():
    model = inject_rank_experts(llama(), token_config()).eval()
    inject_rank_experts(model, task_config(), adapter_name="tasks").eval()
    for layer in model.modules():
        if isinstance(layer, RankExpertLinear):
            layer.set_adapter(["default", "tasks"])
    inputs, ids = batch("llama"), task_ids("task")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 7, 32)
    with use_task(model, "mnli"):
        both = layer(x)
        layer.set_adapter("tasks")
        second = layer(x)
        layer.set_adapter("default")
        first = layer(x)
    torch.testing.assert_close(both - layer.base_layer(x), first + second - 2 * layer.base_layer(x))
    assert model(**inputs, **ids).logits.shape == (4, 7, 64)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = inject_rank_experts(bert(), token_config(target_modules=["query"], modules_to_save=["classifier"])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch("bert")).loss.backward()
    optimizer.step()
    save_rank_experts(model, tmp_path)
    loaded = load_rank_experts(bert(), tmp_path).eval()
    assert torch.equal(loaded(**batch("bert")).logits, model.eval()(**batch("bert")).logits)
    assert not torch.equal(loaded.classifier.modules_to_save["default"].weight, bert().classifier.weight)


def test_a_task_type_trains_and_saves_its_head_as_peft_does(tmp_path):
    model = inject_rank_experts(bert(), token_config(target_modules=["query"], task_type="SEQ_CLS")).eval()
    assert model.classifier.modules_to_save["default"].weight.requires_grad
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.add_(1.0)
    save_rank_experts(model, tmp_path)
    expected = model(**batch("bert")).logits
    for loaded in (PeftModel.from_pretrained(bert(), tmp_path), load_rank_experts(bert(), tmp_path)):
        assert torch.equal(loaded.eval()(**batch("bert")).logits, expected)


def test_default_targets_are_pefts():
    config = RankExpertConfig.smora(r=8, top_k=2)
    assert {path.rpartition(".")[2] for path in find_targets(llama(), config)} == {"q_proj", "v_proj"}


REFUSED = {
    "nothing matches": (
        token_config(target_modules=["q_porj"]),
        ValueError,
        r"No module .*q_porj.*nearest is 'q_proj'",
    ),
    "regex matches nothing": (token_config(target_modules=r".*\.nothing"), ValueError, r"No module"),
    "not linear": (token_config(target_modules=["embed_tokens"]), TypeError, r"model\.embed_tokens is a Embedding"),
    "top_k beyond a pattern's experts": (
        token_config(rank_pattern={"k_proj": 2}),
        ValueError,
        r"model\.layers\.0\.self_attn\.k_proj: top_k=4 is outside 1…2",
    ),
    "a pattern's rank does not divide": (
        token_config(expert_rank=4, top_k=1, rank_pattern={"k_proj": 6}),
        ValueError,
        r"k_proj: r=6 is not a multiple of expert_rank=4",
    ),
    "not our config": (object(), TypeError, r"expected a RankExpertConfig"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_injection_leaves_the_model_untouched(case):
    config, error, message = REFUSED[case]
    model = llama()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        inject_rank_experts(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("case", [case for case in REFUSED if case != "not our config"])
def test_get_peft_model_refuses_before_it_changes_the_model(case):
    config, _, message = REFUSED[case]
    model = llama()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(model, config)
    assert_unchanged(model, before)


def test_the_same_adapter_name_twice():
    model = inject_rank_experts(llama(), token_config())
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"q_proj has an adapter 'default' already"):
        inject_rank_experts(model, task_config())
    assert_unchanged(model, before)


def test_other_methods_adapters_are_refused_by_name():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), gpt2())
    with pytest.raises(TypeError, match=r"transformer\.h\.0\.attn\.c_attn is already adapted by peft\.tuners\.lora"):
        inject_rank_experts(model, token_config(target_modules=["c_attn"]), adapter_name="second")


def test_a_plain_torch_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 8)
    before = model(x)
    inject_rank_experts(model, token_config(target_modules=["0", "2"], init_weights=True))
    assert torch.equal(model(x), before)
