"""Where a forward enters and leaves a model: outputs of any type, generation, copies, checkpointing, what is frozen."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from helpers import TASKS, gradients, task_config, token_config
from models import batch, llama, mixtral, t5
from rank_experts import inject_rank_experts, merge_rank_experts, use_task
from rank_experts.calls.call import current_call
from rank_experts.calls.checkpointing import CheckpointInCall, bind_checkpointing
from rank_experts.calls.later import Later
from rank_experts.layers import adapted_layers
from rank_experts.training.balance import take_nan_examples

Named = namedtuple("Named", "logits loss")
Unlabelled = namedtuple("Unlabelled", "first second")


class Plain(nn.Module):
    """A module that returns what it is told to."""

    def __init__(self, pack):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.pack = pack

    def forward(self, x, labels=None):
        y = self.proj(x)
        return self.pack(y, y.square().mean())


def losses(pack):
    """What the forward returns, and the auxiliary loss that it must hold."""
    torch.manual_seed(0)
    model = inject_rank_experts(Plain(pack), task_config(target_modules=["proj"], contrastive_coef=1.0)).train()
    x, found = torch.randn(3, 4, 6), []
    inner = model.forward.original

    def watched(*args, **kwargs):
        outputs = inner(*args, **kwargs)
        scope = next(layer for _, layer in adapted_layers(model)).scope
        found.append(torch.stack([loss for _, loss in current_call(scope).losses]).mean())
        return outputs

    model.forward.original = watched
    outputs = model(x, labels=x, task_ids=torch.tensor([2, 0, 1]))
    return outputs, model.proj.base_layer, found[0], x


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_the_loss_in_a_plain_dict_grows(kind):
    raw = {}

    def pack(y, loss):
        raw["loss"] = loss
        return kind(loss=loss, logits=y)

    outputs, _, auxiliary, _ = losses(pack)
    assert type(outputs) is kind
    assert list(outputs) == ["loss", "logits"]
    assert auxiliary > 0
    torch.testing.assert_close(outputs["loss"], raw["loss"] + auxiliary)


def test_a_dict_without_a_loss_gets_an_entry():
    outputs, _, auxiliary, _ = losses(lambda y, loss: {"scores": y})
    assert list(outputs) == ["scores", "rank_expert_loss"]
    torch.testing.assert_close(outputs["rank_expert_loss"], auxiliary)


def test_the_loss_in_a_named_tuple_grows_wherever_it_stands():
    raw = {}

    def pack(y, loss):
        raw["loss"] = loss
        return Named(y, loss)

    outputs, _, auxiliary, _ = losses(pack)
    assert type(outputs) is Named
    torch.testing.assert_close(outputs.loss, raw["loss"] + auxiliary)
    outputs, *_ = losses(lambda y, loss: Unlabelled(y, loss))
    assert type(outputs) is Unlabelled
    assert outputs.second.dim() == 0


def test_a_tuple_whose_first_entry_is_no_loss_is_left_alone():
    """As in LoRA, what is not a loss is not changed, labels or not."""
    raw = {}

    def pack(y, loss):
        raw["y"] = y
        return y, loss

    outputs, *_ = losses(pack)
    assert torch.equal(outputs[0], raw["y"])
    outputs, _, auxiliary, _ = losses(lambda y, loss: (loss, y))
    torch.testing.assert_close(outputs[0], outputs[1].square().mean() + auxiliary)


def test_a_bare_tensor_stays_a_tensor():
    outputs, *_ = losses(lambda y, loss: y)
    assert type(outputs) is torch.Tensor


# Generation


OPTIONS = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("tasks", ["rte", ["rte"], torch.tensor([2])])
def test_an_assistant_model_does_not_see_the_tasks(tasks):
    model = inject_rank_experts(llama(), task_config()).eval()
    inputs = {"input_ids": batch("llama", labels=False)["input_ids"][:1].clamp(min=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with use_task(model, "rte"):
        expected = model.generate(**inputs, **OPTIONS)
    assert not torch.equal(expected, model.generate(**inputs, **OPTIONS, task_ids="cola"))
    assert torch.equal(model.generate(**inputs, **OPTIONS, task_ids=tasks, assistant_model=llama()), expected)


def test_names_and_ids_in_generate_follow_the_beams():
    model = inject_rank_experts(llama(), task_config()).eval()
    inputs = {"input_ids": batch("llama", labels=False)["input_ids"].clamp(min=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ids = torch.tensor([2, 0, 1, 2])
    by_ids = model.generate(**inputs, **OPTIONS, num_beams=2, task_ids=ids)
    assert torch.equal(model.generate(**inputs, **OPTIONS, num_beams=2, task_ids=[TASKS[i] for i in ids]), by_ids)
    assert torch.equal(model.generate(inputs["input_ids"], **OPTIONS, num_beams=2, task_ids=ids), by_ids)
    with pytest.raises(ValueError, match="3 task ids for 4 rows"):
        model.generate(**inputs, **OPTIONS, task_ids=ids[:3])


def test_generate_batch_says_that_no_task_reaches_it():
    model = inject_rank_experts(llama(), task_config()).eval()
    prompts = [[5, 6, 7], [8, 9]]
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    with use_task(model, "rte"), pytest.raises(RuntimeError, match=r"generate_batch runs the model in a thread.*merge"):
        model.generate_batch(prompts, generation_config=config)


def test_a_copy_and_a_pickle_generate_for_themselves():
    model = inject_rank_experts(llama(), task_config()).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = model.generate(**inputs, **OPTIONS, task_ids="rte")
    other = copy.deepcopy(model)
    assert other.generate.module is other
    assert other.generate.scope is not model.generate.scope
    assert torch.equal(other.generate(**inputs, **OPTIONS, task_ids="rte"), expected)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.generate(**inputs, **OPTIONS, task_ids="rte"), expected)


def test_nothing_is_left_after_merging_and_unloading():
    model = inject_rank_experts(llama(), task_config())
    assert {"forward", "generate"} <= set(model.__dict__)
    merged = merge_rank_experts(model, task="rte", unload=True)
    assert not {"forward", "generate", "init_continuous_batching"} & set(merged.__dict__)


# Copies on several devices


def test_data_parallel_is_refused_by_name_with_the_way_out():
    """Its replicas share the first device's modules through the instance's forward; LoRA's do not."""
    model = inject_rank_experts(llama(), task_config())
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel made a copy of LlamaForCausalLM.*torchrun.*CUDA_VISIBLE"):
        replica(**batch("llama"), task_ids="rte")
    model(**batch("llama"), task_ids="rte")


# Checkpointing


def test_every_forward_looks_at_no_more_modules_than_the_base_has(monkeypatch):
    """A mixture has most of its modules below its adapted experts, and nothing to checkpoint there."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = inject_rank_experts(mixtral(), task_config(target_modules=["q_proj"], target_parameters=targets))
    base = len(list(mixtral().modules()))
    visited = []
    original = nn.Module.__getattribute__

    def count(self, name):
        if name == "_modules":
            visited.append(self)
        return original(self, name)

    scope = next(layer for _, layer in adapted_layers(model)).scope
    monkeypatch.setattr(nn.Module, "__getattribute__", count, raising=False)
    bind_checkpointing(model, scope)
    monkeypatch.undo()
    assert 10 < len(set(map(id, visited))) <= base < len(list(model.modules())) / 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_may_be_turned_on_between_two_forwards(use_reentrant):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper

    ids = torch.tensor([2, 0, 1, 2])
    model = inject_rank_experts(llama(), task_config()).double().train()
    model(**batch("llama"), task_ids=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch("llama"), task_ids=ids).loss.backward()
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    model.gradient_checkpointing_disable()
    model.zero_grad()
    layers = model.model.layers
    for i in range(len(layers)):
        layers[i] = checkpoint_wrapper(layers[i])
    model(**batch("llama"), task_ids=ids, use_cache=False).loss.backward()
    assert all(isinstance(layer, CheckpointWrapper) for layer in layers)
    assert all(isinstance(layer.checkpoint_fn, CheckpointInCall) for layer in layers)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name.replace("_checkpoint_wrapped_module.", "")], msg=name)


# Frozen adapters


@pytest.mark.parametrize("config", [task_config, lambda: token_config(load_balance="loss")])
def test_a_frozen_adapter_beside_something_that_trains(config):
    """It has no auxiliary loss then, and its forward is that of LoRA frozen."""
    model = inject_rank_experts(llama(), config()).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    tasks = {"task_ids": "rte"} if config is task_config else {}
    outputs = model(**batch("llama"), **tasks)
    assert not hasattr(outputs, "rank_expert_loss")
    outputs.loss.backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_frozen_router_whose_a_and_b_train():
    """Its balancing loss hangs on nothing that trains; that is no fault of checkpointing."""
    model = inject_rank_experts(llama(), token_config(load_balance="loss", target_modules=r".*layers\.0.*q_proj"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".A", ".B")))
    model.train()(**batch("llama")).loss.backward()
    assert gradients(model)


# NaN


class Slow:
    """A tensor that an accelerator has not finished."""

    def __init__(self, tensor):
        self.tensor, self.ready = tensor, False

    def is_here(self):
        return self.ready

    def get(self):
        assert self.ready, "somebody waits"
        return self.tensor


def test_what_an_accelerator_still_computes_is_not_waited_for():
    model = inject_rank_experts(llama(), task_config()).train()
    scope = next(layer for _, layer in adapted_layers(model)).scope
    slow = Slow(torch.tensor([True, False]))
    scope.suspects.append(("rte", Later(torch.tensor([False, True]))))
    scope.suspects.append(("cola", slow))
    scope.suspects.append(("mnli", Later(torch.tensor([True, True]))))
    assert take_nan_examples(model, wait=False) == {"rte": 1}
    assert take_nan_examples(model, wait=False) == {}
    slow.ready = True
    assert take_nan_examples(model, wait=False) == {"cola": 1, "mnli": 2}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("make", "halves"), [(llama, 1), (t5, 3)])
def test_tasks_become_ids_once_where_a_forward_enters_and_not_once_a_layer(monkeypatch, make, halves, checkpointing):
    from rank_experts.calls import tasks

    calls = []
    original = tasks.resolve_task_ids
    monkeypatch.setattr(tasks, "resolve_task_ids", lambda *args: calls.append(1) or original(*args))
    model = inject_rank_experts(make(), task_config(target_modules=r".*(q_proj|down_proj|\.q|\.wi|lm_head)")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch(make.__name__), task_ids=torch.tensor([2, 0, 1, 2])).loss.backward()
    assert 0 < len(calls) <= halves
