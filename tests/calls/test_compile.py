"""torch.compile without graph breaks, generation with a static cache, torch.export."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import models
from gates import GATES, batch, config, peft_model, tasks
from helpers import TASKS, assert_same_gradients, gradients
from rank_experts import inject_rank_experts, update_router_bias, use_task
from rank_experts.layers import adapted_layers

EVERY = pytest.mark.parametrize("gate", GATES)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, **({"backend": "aot_eager"} | options))


def tiny(gate, **kwargs):
    torch.manual_seed(0)
    base = models.llama(num_hidden_layers=1)
    return inject_rank_experts(base, config(gate, target_modules=["q_proj", "down_proj"], **kwargs))


@EVERY
def test_inference_with_changing_batch_and_length(gate):
    model = tiny(gate).eval()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for size, length in ((4, 7), (3, 9), (6, 5)):
            inputs = batch(gate, size=size, length=length)
            torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@EVERY
def test_training(gate):
    kwargs = {"load_balance": "loss"} if gate == "token" else {}
    model = tiny(gate, **kwargs).train()
    inputs = batch(gate)
    eager = model(**inputs)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    outputs = compiled(model, dynamic=True)(**inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, eager.loss)
    assert_same_gradients(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_training_counts_the_load():
    model = tiny("token").train()
    inputs = batch("token")
    fast = compiled(model)
    for _ in range(3):
        fast(**inputs).loss.backward()
    tokens = int(inputs["attention_mask"].sum())
    for _, layer in adapted_layers(model):
        assert layer.scope.loads[layer.path, "default"].sum() == 3 * tokens * 2
    update_router_bias(model)
    before = [layer.rank_experts["default"].balance_bias.clone() for _, layer in adapted_layers(model)]
    assert any(b.abs().sum() > 0 for b in before)
    # The graph sees the bias that has moved.
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@EVERY
def test_inductor(gate):
    model = tiny(gate).train()
    inputs = batch(gate)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled(model, backend="inductor")(**inputs).loss.backward()
    assert_same_gradients(gradients(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@EVERY
def test_a_compiled_peft_model(gate):
    model = peft_model(gate, task_type="CAUSAL_LM", target_modules=["q_proj"]).eval()
    inputs = batch(gate)
    with torch.no_grad():
        expected = model(**inputs).logits
        got = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_tasks_may_change_between_calls_of_one_graph():
    model = tiny("task").eval()
    fast = compiled(model)
    inputs = batch("task")
    plain = {name: tensor for name, tensor in inputs.items() if name != "task_ids"}
    with torch.no_grad():
        for shift in range(3):
            ids = (inputs["task_ids"] + shift) % 3
            torch.testing.assert_close(
                fast(**plain, task_ids=ids).logits, model(**plain, task_ids=ids).logits, rtol=1e-4, atol=1e-5
            )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for name in TASKS:
            with use_task(model, name):
                torch.testing.assert_close(fast(**plain).logits, model(**plain).logits, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + 1


@EVERY
def test_generation_with_a_static_cache(gate):
    model = tiny(gate).eval()
    inputs = {
        name: tensor for name, tensor in batch(gate, size=2, length=5).items() if name not in ("labels", "task_ids")
    }
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    task_ids = tasks(gate, 2).get("task_ids")
    options = {"max_new_tokens": 6, "do_sample": False}

    def generate(**more):
        if task_ids is None:
            return model.generate(**inputs, **options, **more)
        with use_task(model, task_ids):
            return model.generate(**inputs, **options, **more)

    expected = generate()
    assert torch.equal(generate(cache_implementation="static"), expected)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(generate(cache_implementation="static"), expected)


@pytest.mark.slow
@EVERY
def test_export(gate):
    model = tiny(gate).eval()
    inputs = batch(gate, labels=False) | {"use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        program = torch.export.export(model, (), inputs, strict=False)
        torch.testing.assert_close(program.module()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        if gate == "task":
            other = inputs | {"task_ids": inputs["task_ids"].flip(0)}
            torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, rtol=1e-4, atol=1e-5)


@EVERY
def test_export_with_changing_batch_and_length(gate):
    model = tiny(gate).eval()
    inputs = batch(gate, labels=False) | {"use_cache": False}
    size, length = torch.export.Dim("size", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    shapes = {"input_ids": {0: size, 1: length}, "attention_mask": {0: size, 1: length}, "use_cache": None}
    if gate == "task":
        shapes["task_ids"] = {0: size}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        other = batch(gate, labels=False, size=5, length=9) | {"use_cache": False}
        torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, rtol=1e-4, atol=1e-5)


@EVERY
def test_compiling_after_wrapping_and_saving(gate, tmp_path):
    """The file of a compiled model has no trace of the compiler in its names."""
    from safetensors.torch import load_file

    model = get_peft_model(models.llama(num_hidden_layers=1), config(gate, target_modules=["q_proj"]))
    fast = torch.compile(model, backend="aot_eager")
    fast(**batch(gate))
    fast.save_pretrained(tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
