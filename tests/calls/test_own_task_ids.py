"""A model whose forward has a `task_ids` argument of its own gets it, and so do the layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertModel, LlamaForCausalLM

from helpers import TASKS, dense_config, task_config, token_config
from models import batch, bert, llama
from rank_experts import inject_rank_experts, use_task
from rank_experts.training import HeadSpec, MultiTaskClassifier

IDS = torch.tensor([2, 0, 1, 2])


class Shifted(nn.Module):
    """A layer, and a vector for every task that is added to its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(len(TASKS), 6), requires_grad=False)

    def forward(self, x, task_ids, scale=1.0):
        return self.proj(x) + self.shift[task_ids] * scale


class Variadic(Shifted):
    """The same with inputs by position and the ids by name alone."""

    def forward(self, *xs, task_ids=None, attention_mask=None):
        return super().forward(sum(xs), task_ids)


class Counted(Shifted):
    """The same for one task, whose id is a plain number."""

    def forward(self, x, task_ids=0):
        return super().forward(x, torch.tensor([task_ids]))


def adapted(model, wrapped, config):
    """The model with an adapter, in place or in a PeftModel."""
    torch.manual_seed(1)
    return get_peft_model(model, config) if wrapped else inject_rank_experts(model, config)


def expected_rows(model, x, ids):
    """Each example alone, routed by `use_task`, its own ids given apart."""
    rows = []
    for row, task in zip(x, ids.tolist()):
        with use_task(model, TASKS[task]):
            rows.append(model.proj(row[None]) + model.shift[task])
    return torch.cat(rows)


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "peft"])
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
def test_a_module_with_task_ids_of_its_own(wrapped, by_name):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    base = Shifted()
    config = {"target_modules": ["proj"]}
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    untrained = adapted(copy.deepcopy(base), wrapped, task_config(**config, init_weights=True))
    arguments, named = ((x,), {"task_ids": IDS}) if by_name else ((x, IDS), {})
    assert torch.equal(lora(*arguments, **named), base(x, IDS))  # what PEFT's users have
    assert torch.equal(untrained(*arguments, **named), base(x, IDS))
    model = adapted(copy.deepcopy(base), wrapped, task_config(**config)).eval()
    inner = model.get_base_model() if wrapped else model
    outputs = model(*arguments, **named)
    torch.testing.assert_close(outputs, expected_rows(inner, x, IDS))
    assert not torch.allclose(outputs, base(x, IDS), atol=1e-3)
    half = model(*arguments, **named, scale=0.5)
    torch.testing.assert_close(half, outputs - 0.5 * inner.shift[IDS])


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "peft"])
def test_inputs_by_position_only(wrapped):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = adapted(Variadic(), wrapped, task_config(target_modules=["proj"])).eval()
    inner = model.get_base_model() if wrapped else model
    outputs = model(x / 2, x / 2, task_ids=IDS, attention_mask=torch.ones(4, 6))
    torch.testing.assert_close(outputs, expected_rows(inner, x, IDS))


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "peft"])
@pytest.mark.parametrize("config", [token_config, dense_config])
def test_what_the_ids_are_is_the_models_affair_where_no_layer_routes_by_task(wrapped, config):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    base = Counted()
    model = adapted(copy.deepcopy(base), wrapped, config(target_modules=["proj"], init_weights=True)).eval()
    for number in (0, 2):
        assert torch.equal(model(x, task_ids=number), base(x, number))
    assert torch.equal(model(x), base(x))


def test_an_argument_that_is_none_is_handed_on_as_any_other():
    class Named(Shifted):
        def forward(self, x, task_ids):
            return self.proj(x) if task_ids is None else super().forward(x, task_ids)

    model = inject_rank_experts(Named(), task_config(target_modules=["proj"])).eval()
    x = torch.randn(4, 6)
    with use_task(model, "rte"):
        assert torch.equal(model(x, task_ids=None), model(x, None))


def test_a_forward_that_others_replaced():
    """As TRL does: our call is around the module by its hooks alone."""
    model = inject_rank_experts(Shifted(), task_config(target_modules=["proj"])).eval()
    x = torch.randn(4, 6)
    expected = model(x, task_ids=IDS)
    model.forward = lambda x, task_ids: Shifted.forward(model, x, task_ids)
    assert torch.equal(model(x, task_ids=IDS), expected)
    assert torch.equal(model(x, IDS), expected)


def classifier():
    encoder = BertModel(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).config)
    torch.manual_seed(2)
    return MultiTaskClassifier(encoder, {task: HeadSpec(["no", "yes", "maybe"]) for task in TASKS})


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "peft"])
def test_a_classifier_with_heads(wrapped):
    """The adapter may be put into the encoder, or into the classifier as a whole: the same comes out."""
    inputs = {**batch("bert", labels=False), "labels": torch.tensor([0, 1, 2, 0])}
    config = {"target_modules": ["query", "value"]}
    whole = adapted(classifier(), wrapped, task_config(**config))
    inside = classifier()
    torch.manual_seed(1)
    inject_rank_experts(inside.encoder, task_config(**config))
    for model in (whole, inside):
        model.eval()
    with torch.no_grad():
        expected = inside(**inputs, task_ids=IDS)
        found = whole(**inputs, task_ids=IDS)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
        assert not torch.equal(whole(**inputs, task_ids=IDS.flip(0)).logits, found.logits)
        with pytest.raises(ValueError, match="task_ids are missing"):
            whole(**inputs)
    for model in (whole, inside):
        model.train()
    losses = [model(**inputs, task_ids=IDS).rank_expert_loss.item() for model in (whole, inside)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0


class Biased(LlamaForCausalLM):
    """A language model with a bias on its logits for every task."""

    def __init__(self, config):
        super().__init__(config)
        self.task_bias = nn.Parameter(torch.randn(len(TASKS), config.vocab_size) * 3, requires_grad=False)

    def forward(self, input_ids=None, task_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        outputs.logits = outputs.logits + self.task_bias[task_ids][:, None]
        return outputs


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_language_model_in_each_of_pefts_classes(task_type):
    inputs = batch("llama", labels=False)
    torch.manual_seed(0)
    base = Biased(llama().config).eval()
    config = {"target_modules": ["q_proj", "v_proj"]}
    injected = adapted(copy.deepcopy(base), False, task_config(**config)).eval()
    wrapped = adapted(copy.deepcopy(base), True, task_config(**config, task_type=task_type)).eval()
    for model in (injected, wrapped):
        logits = model(**inputs, task_ids=IDS).logits
        assert torch.equal(logits, injected(**inputs, task_ids=IDS).logits)
        assert not torch.allclose(logits, base(**inputs, task_ids=IDS).logits, atol=1e-3)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        written = model.generate(**inputs, task_ids=IDS, **options)
        for row, task in enumerate(IDS.tolist()):
            alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            expected = injected.generate(**alone, task_ids=torch.tensor([task]), **options)
            assert torch.equal(written[row], expected[0])
