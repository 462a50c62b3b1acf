"""Only what trains counts: loads and auxiliary losses, beside LoRA in the same situation, which has neither.

A forward counts where gradients are recorded and the adapter has something that trains, in training mode.
"""

from __future__ import annotations

import pytest
import torch

from helpers import CONFIGS, dense_config, gradients, task_config, token_config
from models import batch, llama
from rank_experts import inject_rank_experts, update_router_bias, use_task
from rank_experts.layers import adapted_layers

OPTIONS = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)


def make(config, **options):
    return inject_rank_experts(llama(), config(**options)).train()


def inputs_of(config):
    return batch("llama") | ({"task_ids": torch.tensor([2, 0, 1, 2])} if config is task_config else {})


def counted(model) -> float:
    scope = next(layer for _, layer in adapted_layers(model)).scope
    return float(sum(load.sum() for load in scope.loads.values()))


def biases(model):
    return torch.cat([layer.rank_experts["default"].balance_bias for _, layer in adapted_layers(model)])


def test_a_training_forward_counts_every_token_once():
    model = make(token_config)
    model(**batch("llama")).loss.backward()
    tokens = int(batch("llama")["attention_mask"].sum())
    assert counted(model) == tokens * 4 * len(list(adapted_layers(model)))


@torch.no_grad()
def without_gradients(model, inputs):
    return model(**inputs)


def generating(model, inputs):
    given = {name: inputs[name].clamp(min=1) for name in ("input_ids", "attention_mask")}
    model.generate(**given, **OPTIONS, **{name: inputs[name] for name in inputs if name == "task_ids"})


def evaluating(model, inputs):
    model.eval()
    outputs = model(**inputs)
    model.train()
    return outputs


def frozen(model, inputs):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs


def inference(model, inputs):
    with torch.inference_mode():
        return model(**inputs)


SITUATIONS = [without_gradients, generating, evaluating, frozen, inference]
every_situation = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)


@every_situation
def test_nothing_counts_where_nothing_trains(situation):
    model = make(token_config)
    before = biases(model).clone()
    situation(model, inputs_of(token_config))
    assert counted(model) == 0
    update_router_bias(model)
    assert torch.equal(biases(model), before)


@every_situation
@pytest.mark.parametrize("config", [dense_config, task_config, lambda **kw: token_config(load_balance="loss", **kw)])
def test_no_auxiliary_loss_where_nothing_trains(situation, config):
    """The loss is LoRA's: that of the same model with the adapters' outputs, and nothing beside it."""
    outputs = situation(make(config), inputs_of(config))
    assert not hasattr(outputs, "rank_expert_loss")
    if outputs is not None:
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs_of(config)["labels"][:, 1:].flatten()
        torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("config", [task_config, lambda **kw: token_config(load_balance="loss", **kw)])
def test_the_same_forward_counts_where_it_trains(config):
    outputs = make(config)(**inputs_of(config))
    assert outputs.rank_expert_loss > 0


def test_generating_between_training_steps_changes_nothing():
    """As GRPO and evaluation callbacks do it: the steps are those without it, bit for bit."""
    runs = []
    for generates in (False, True):
        model = make(token_config)
        for _ in range(2):
            if generates:
                generating(model, batch("llama"))
                without_gradients(model, batch("llama"))
            model(**batch("llama")).loss.backward()
            update_router_bias(model)
        runs.append((gradients(model), biases(model)))
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][1].any()
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


def test_a_frozen_adapter_beside_one_that_trains_keeps_its_bias():
    model = make(token_config)
    from peft import get_peft_model

    wrapped = get_peft_model(llama(), token_config()).train()
    wrapped.add_adapter("other", token_config())
    wrapped.set_adapter("other")
    wrapped(**batch("llama")).loss.backward()
    update_router_bias(wrapped)
    for _, layer in adapted_layers(wrapped):
        assert not layer.rank_experts["default"].balance_bias.any()
        assert layer.rank_experts["other"].balance_bias.any()
    del model


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant):
    """Reentrant checkpointing runs a block without recording first, and again in backward."""
    model = make(token_config)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch("llama")).loss.backward()
    tokens = int(batch("llama")["attention_mask"].sum())
    assert counted(model) == tokens * 4 * len(list(adapted_layers(model)))


@pytest.mark.parametrize("gate", CONFIGS)
def test_disabled_adapters_count_nothing(gate):
    from peft import get_peft_model

    model = get_peft_model(llama(), CONFIGS[gate]()).train()
    model.base_model.model.model.embed_tokens.requires_grad_(True)
    with model.disable_adapter(), use_task(model, "rte") if gate == "task" else torch.enable_grad():
        outputs = model(**batch("llama"))
    assert counted(model) == 0
    assert not hasattr(outputs, "rank_expert_loss")
