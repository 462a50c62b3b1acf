"""What an adapter of a layer is to PEFT, FSDP2, ZeRO-3 and copies, which look at modules and names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import models
from gates import GATES, batch, config, logits, peft_model, randomise
from mixtures import expert_config
from rank_experts import inject_rank_experts, use_task
from rank_experts.layers import adapted_layers
from rank_experts.layers.adapter import RankExpertAdapter

EVERY = pytest.mark.parametrize("gate", GATES)


def injected(gate: str, experts: bool = False, **kwargs):
    if experts:
        return inject_rank_experts(models.mixtral(), expert_config(gate, **kwargs))
    return inject_rank_experts(models.llama(), config(gate, **kwargs))


@EVERY
@pytest.mark.parametrize("experts", [False, True])
def test_every_tensor_is_a_direct_child_of_one_module(gate, experts):
    """PEFT strips an adapter's name from the last part of a key but one; its FSDP policy wraps what has a `weight`."""
    model = injected(gate, experts, **({"task_embedding_dim": 8} if gate == "task" else {}))
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, RankExpertAdapter)}
    assert adapters
    for path, adapter in adapters.items():
        assert path.endswith(".rank_experts.default")
        assert path.count("rank_experts") == 1
        names = [name for name, _ in [*adapter.named_parameters(), *adapter.named_buffers()]]
        assert all("." not in name for name in names)
        assert not {"weight", "bias"} & set(names)
        # accelerate's hook and FSDP2 bring a module's own tensors when it is called: a child would be called apart.
        assert all(type(child) is nn.Dropout for child in adapter.children())
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in own) == (".rank_experts." in name) == parameter.requires_grad, name
        assert name.count("rank_experts") <= 1


@EVERY
def test_an_adapter_is_called_once_and_reads_its_tensors_within(gate):
    """With its tensors on the meta device outside of its forward, as accelerate and ZeRO-3 leave them."""
    model = injected(gate)
    randomise(model)
    inputs = batch(gate)
    expected = logits(model, inputs)
    calls = []
    for path, layer in adapted_layers(model):
        adapter = layer.rank_experts["default"]
        kept = dict(adapter._parameters)

        def bring(module, args, kept=kept, path=path):
            calls.append(path)
            module._parameters.update(kept)

        def take(module, args, output):
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"))

        adapter.register_forward_pre_hook(bring)
        adapter.register_forward_hook(take)
        take(adapter, (), None)
    assert torch.equal(logits(model, inputs), expected)
    assert calls == [path for path, _ in adapted_layers(model)]


@EVERY
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_models_of_their_own(gate, way, wrapped):
    model = peft_model(gate) if wrapped else injected(gate)
    randomise(model)
    inputs = batch(gate)
    expected = logits(model, inputs)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied, inputs), expected)
    scopes = [{id(layer.scope) for _, layer in adapted_layers(one)} for one in (model, copied)]
    assert len(scopes[0]) == len(scopes[1]) == 1
    assert scopes[0] != scopes[1]
    randomise(copied, seed=5)
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(copied, inputs), expected)
    if gate == "task":
        plain = {name: value for name, value in inputs.items() if name != "task_ids"}
        with use_task(copied, "rte"), pytest.raises(ValueError, match="task"):
            logits(model, plain)
    copied.train()
    copied(**inputs).loss.backward()
    assert all(p.grad is not None for p in copied.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
