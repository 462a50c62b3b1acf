"""What an adapter may be called, and modules that are called as an adapter or one of its tensors is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import models
from gates import GATES, batch, config, logits, peft_model, randomise
from helpers import assert_unchanged, fingerprint
from mixtures import EXPERTS
from rank_experts import inject_rank_experts, load_rank_experts, save_rank_experts, update_router_bias
from rank_experts.layers import adapted_layers
from rank_experts.layers.adapter import RankExpertAdapter
from rank_experts.tuner.names import TENSORS

IMPOSSIBLE = ["", "v1.0", "A", "B", "router_weight", "task_embedding", "keys", "train", "values", "rank_experts"]
WAYS = ["inject", "load", "get_peft_model", "from_pretrained", "add_adapter", "load_adapter", "transformers"]


def add(way: str, model, gate: str, name: str, folder):
    """Give a model an adapter in one of the ways there are; a PeftModel where the way begins with one."""
    if way == "inject":
        return inject_rank_experts(model, config(gate), name)
    if way == "load":
        return load_rank_experts(model, folder, name)
    if way == "get_peft_model":
        return get_peft_model(model, config(gate), adapter_name=name)
    if way == "from_pretrained":
        return PeftModel.from_pretrained(model, folder, adapter_name=name)
    if way == "load_adapter":
        model.load_adapter(folder, name)
    elif way == "transformers":
        model.add_adapter(config(gate), name)
    else:
        model.add_adapter(name, config(gate))
    return model


def test_the_list_of_tensors_is_complete():
    found = set()
    for gate in GATES:
        model = peft_model(gate, **({"task_embedding_dim": 8} if gate == "task" else {}))
        adapters = [module for module in model.modules() if isinstance(module, RankExpertAdapter)]
        found |= {name for adapter in adapters for name in adapter.state_dict()}
    assert found == set(TENSORS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_name_is_refused_before_anything_changes(name, way, tmp_path):
    peft_model("token").save_pretrained(tmp_path)
    model = models.llama() if way not in ("add_adapter", "load_adapter") else peft_model("token")
    before = fingerprint(model)
    if way == "transformers" and not name:
        return  # transformers takes "" for "default"
    with pytest.raises(ValueError, match="An adapter cannot be called"):
        add(way, model, "token", name, tmp_path)
    assert_unchanged(model, before)
    model = add(way, model, "token", "fine", tmp_path)
    model.set_adapter("fine") if hasattr(model, "set_adapter") and way != "inject" and way != "load" else None
    assert all("fine" in layer.active_adapters for _, layer in adapted_layers(model))


@pytest.mark.parametrize("way", ["inject", "transformers"])
def test_a_refused_second_name_leaves_the_first_adapter_usable(way, tmp_path):
    model = add(way, models.llama(), "token", "first", tmp_path)
    before, expected = fingerprint(model), logits(model, batch("token"))
    with pytest.raises(ValueError, match="An adapter cannot be called"):
        add(way, model, "token", "v1.0", tmp_path)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, batch("token")), expected)
    add(way, model, "token", "second", tmp_path)
    model.set_adapter("first") if way == "transformers" else None


class Named(nn.Module):
    """Linear layers at a path of the caller's choice."""

    def __init__(self, *parts: str):
        super().__init__()
        inner: nn.Module = nn.Linear(6, 6)
        for part in reversed(parts):
            outer = nn.Module()
            outer.add_module(part, inner)
            inner = outer
        self.body = inner
        self.parts = parts

    def forward(self, x):
        module = self.body
        for part in self.parts:
            module = getattr(module, part)
        return module(x)


@pytest.mark.parametrize("gate", ["token", "dense", "lora"])
@pytest.mark.parametrize("parts", [("default",), ("default", "proj"), ("A",), ("proj", "B"), ("A", "default", "B")])
def test_modules_called_as_an_adapter_or_a_tensor(gate, parts, tmp_path):
    """They train, are saved and are loaded again, alike with LoRA."""
    torch.manual_seed(0)
    target = {"target_modules": [parts[-1]]}
    made = LoraConfig(r=4, init_lora_weights=False, **target) if gate == "lora" else config(gate, **target)
    base = Named(*parts)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, made)
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    if gate != "lora":
        randomise(model)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    again = Named(*parts)
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(loaded(x), expected)
    if gate != "lora":
        save_rank_experts(model, tmp_path / "ours")
        again = Named(*parts)
        again.load_state_dict(state)
        assert torch.equal(load_rank_experts(again, tmp_path / "ours").eval()(x), expected)


@pytest.mark.parametrize("parts", [("rank_experts",), ("my_rank_experts", "proj")])
def test_a_module_called_as_the_method_is_refused(parts):
    model = Named(*parts)
    before = fingerprint(model)
    for add_to in (inject_rank_experts, get_peft_model):
        with pytest.raises(ValueError, match="has 'rank_experts' in its name"):
            add_to(model, config("token", target_modules=[parts[-1]]))
        assert_unchanged(model, before)


def test_of_two_adapters_none_is_called_as_a_module():
    """PEFT would save the other one without a single tensor, or without that module's. (LoRA too.)"""
    model = get_peft_model(Named("default", "proj"), config("token", target_modules=["proj"]))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"Beside adapter 'second' none can be called 'default'.*body\.default"):
        model.add_adapter("second", config("token", target_modules=["proj"]))
    assert_unchanged(model, before)
    model = inject_rank_experts(Named("default", "proj"), config("token", target_modules=["proj"]), "first")
    with pytest.raises(ValueError, match="none can be called 'model'"):
        inject_rank_experts(model, config("token", target_modules=["proj"]), "model")
    inject_rank_experts(model, config("token", target_modules=["proj"]), "second")


def test_a_name_that_meets_no_path_of_the_other_adapter_is_fine(tmp_path):
    model = peft_model("token", target_modules=["q_proj"])
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    model.add_adapter("mlp", config("token", target_modules=["up_proj"]))
    after = get_peft_model_state_dict(model)
    assert before.keys() == after.keys()
    with pytest.raises(ValueError, match="Beside adapter 'third' none can be called 'mlp'"):
        model.add_adapter("third", config("token", target_modules=["down_proj"]))
    head = models.bert()
    head = get_peft_model(head, config("token", target_modules=["query"], modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match="Beside adapter 'default' none can be called 'classifier'"):
        head.add_adapter("classifier", config("token", target_modules=["query"]))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("gate", [*GATES, "lora"])
def test_a_reference_adapter_as_trl_makes_it(gate, experts):
    """A second adapter with the first one's config object, and every parameter copied by its name."""
    if gate == "lora":
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(models.llama(), lora)
    elif experts:
        model = peft_model(gate, "mixtral", target_modules=[], target_parameters=EXPERTS)
    else:
        model = peft_model(gate)
    randomise(model)
    expected = logits(model, batch(gate))
    model.add_adapter("ref", model.peft_config["default"])
    copied = 0
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            copied += 1
    assert copied
    model.set_adapter("ref")
    assert torch.equal(logits(model, batch(gate)), expected)


def test_a_reference_adapter_keeps_its_balancing_bias(tmp_path):
    """What moves the trained adapter's bias leaves the copy's where it is."""
    model = peft_model("token")
    randomise(model)
    model.add_adapter("ref", model.peft_config["default"])
    bias = {adapter: [] for adapter in ("default", "ref")}
    for _, layer in adapted_layers(model):
        for adapter, found in bias.items():
            found.append(layer.rank_experts[adapter].balance_bias)
    before = [tensor.clone() for tensor in bias["ref"]]
    assert all(torch.equal(one, other) for one, other in zip(bias["default"], bias["ref"]))
    model(**batch("token")).loss.backward()
    update_router_bias(model)
    assert all(torch.equal(one, other) for one, other in zip(before, bias["ref"]))
    assert not any(torch.equal(one, other) for one, other in zip(bias["default"], bias["ref"]))
    model.add_adapter("fresh", config("token"))
    assert not any(layer.rank_experts["fresh"].balance_bias.any() for _, layer in adapted_layers(model))
