"""Tasks reach the right rows: mixed batches, encoder-decoders, caches, beams, threads, checkpointing."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from helpers import TASKS, assert_same_gradients, gradients, task_config, token_config
from models import MODELS, CheckpointedBlock, batch, llama, t5
from rank_experts import inject_rank_experts, use_task
from rank_experts.layers import adapted_layers


@pytest.fixture
def model():
    return inject_rank_experts(llama(), task_config()).eval()


def single(model, inputs, row, task):
    with use_task(model, task), torch.no_grad():
        return model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).logits[0]


def test_a_mixed_batch_equals_its_examples_alone(model):
    inputs = batch("llama", labels=False)
    ids = torch.tensor([2, 0, 1, 2])
    mixed = model(**inputs, task_ids=ids).logits
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed[row], single(model, inputs, row, TASKS[task]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, model(**inputs, task_ids=ids.flip(0)).logits, atol=1e-3)


@pytest.mark.parametrize(
    "tasks", [["rte", "cola", "mnli", "rte"], torch.tensor([2, 0, 1, 2]), torch.tensor([2, 0, 1, 2], dtype=torch.int32)]
)
def test_use_task_takes_names_and_ids(model, tasks):
    inputs = batch("llama", labels=False)
    expected = model(**inputs, task_ids=torch.tensor([2, 0, 1, 2])).logits
    with use_task(model, tasks):
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs, task_ids=tasks).logits, expected)


def test_use_task_nests_and_the_argument_wins(model):
    inputs = batch("llama", labels=False)
    with use_task(model, "cola"):
        outer = model(**inputs).logits
        with use_task(model, "rte"):
            inner = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, outer)
        assert torch.equal(model(**inputs, task_ids="rte").logits, inner)
    assert not torch.equal(outer, inner)


def test_one_task_may_be_left_out():
    model = inject_rank_experts(llama(), task_config(tasks=["only"])).eval()
    inputs = batch("llama", labels=False)
    assert torch.equal(model(**inputs).logits, model(**inputs, task_ids=torch.zeros(4, dtype=torch.long)).logits)


@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        (None, ValueError, r"self_attn\.q_proj: adapter 'default' routes by task and was not told which.*use_task"),
        (
            torch.tensor([0, 1]),
            ValueError,
            r"2 task ids for 3 rows \(LlamaForCausalLM's input_ids of .*packing",
        ),
        (torch.tensor([0, 1, 2, 0]), ValueError, r"4 task ids for 3 rows"),
        (torch.tensor([0, 3, 1]), ValueError, r"task_ids contain 3: expected 0…2"),
        (torch.tensor([0, -1, 1]), ValueError, r"task_ids contain -1: expected 0…2"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, r"task_ids are torch.float32: expected an integer tensor"),
        (torch.tensor([True, False, True]), TypeError, r"task_ids are torch.bool"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"task_ids have shape \(1, 3\): expected \(batch,\)"),
        ("rtee", ValueError, r"Task 'rtee' is unknown.*\['cola', 'mnli', 'rte'\].*nearest is 'rte'"),
        (["cola", "mnli", "qqp"], ValueError, r"Task 'qqp' is unknown"),
        (3, TypeError, r"task_ids is a int"),
    ],
)
def test_bad_task_ids_are_refused(model, task_ids, error, message):
    inputs = batch("llama", size=3, length=4, labels=False)
    with pytest.raises(error, match=message):
        model(**inputs, task_ids=task_ids)
    # Nothing of the failed call is left behind.
    model(**inputs, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="was not told which"):
        model(**inputs)


def test_use_task_refuses_what_it_cannot_route(model):
    with (
        pytest.raises(ValueError, match=r"Task 'snli' is unknown to adapter 'default'.*nearest is 'mnli'"),
        use_task(model, "snli"),
    ):
        pass
    with pytest.raises(ValueError, match="has no task-routed adapter"), use_task(llama(), "rte"):
        pass
    by_token = inject_rank_experts(llama(), token_config())
    with pytest.raises(ValueError, match="has no task-routed adapter"), use_task(by_token, "rte"):
        pass


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}]
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_equals_generating_each_example_alone(name, options):
    model = inject_rank_experts({"llama": llama, "t5": t5}[name](), task_config()).eval()
    inputs = batch(name, size=3, labels=False)
    # No padding: generation from right-padded prompts differs between batched and single for reasons of its own.
    inputs = {"input_ids": inputs["input_ids"].clamp(min=1), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
    ids = torch.tensor([2, 0, 1])
    with use_task(model, ids):
        batched = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, task_ids=ids), batched)
    per_example = options.get("num_return_sequences", 1)
    for row, task in enumerate(ids.tolist()):
        with use_task(model, TASKS[task]):
            alone = model.generate(**{key: value[row : row + 1] for key, value in inputs.items()}, **options)
        assert torch.equal(batched[row * per_example : (row + 1) * per_example], alone)


def test_encoder_decoder_routes_both_halves():
    model = inject_rank_experts(t5(), task_config()).eval()
    inputs = batch("t5")
    ids = torch.tensor([1, 0, 2, 1])
    mixed = model(**inputs, task_ids=ids).logits
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed[row], single(model, inputs, row, TASKS[task]), rtol=1e-4, atol=1e-5)
    only_encoder = inject_rank_experts(t5(), task_config(target_modules=r"encoder.*\.q"))
    assert len(list(adapted_layers(only_encoder))) == 2
    only_encoder(**inputs, task_ids=ids)


def test_layers_that_see_flattened_tokens():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 5)

        def forward(self, x):
            return self.proj(x.reshape(-1, 6)).reshape(*x.shape[:-1], 5)

    torch.manual_seed(0)
    model = inject_rank_experts(Flattening(), task_config(target_modules=["proj"]))
    x, ids = torch.randn(3, 4, 6), torch.tensor([2, 0, 1])
    flat = model(x, task_ids=ids)
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(flat[row], model(x[row : row + 1], task_ids=TASKS[task])[0])


def test_threads_do_not_see_each_others_tasks(model):
    inputs = batch("llama", labels=False)
    expected = {}
    for task in TASKS:
        with use_task(model, task):
            expected[task] = model(**inputs).logits
    barrier, wrong = threading.Barrier(len(TASKS)), []

    def work(task):
        for _ in range(10):
            barrier.wait()
            with use_task(model, task), torch.no_grad():
                if not torch.equal(model(**inputs).logits, expected[task]):
                    wrong.append(task)
        barrier.wait()
        try:
            model(**inputs)
            wrong.append("no error without a task")
        except ValueError:
            pass

    threads = [threading.Thread(target=work, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_models_nested_keep_their_own_tasks(model):
    other = copy.deepcopy(model)
    inputs = batch("llama", labels=False)
    with use_task(model, "rte"), pytest.raises(ValueError, match="was not told which"):
        other(**inputs)
    with use_task(model, "rte"), use_task(other, "cola"):
        assert torch.equal(model(**inputs).logits, model(**inputs, task_ids="rte").logits)
        assert torch.equal(other(**inputs).logits, model(**inputs, task_ids="cola").logits)


CHECKPOINTED = {
    "task": task_config(),
    "token, bias": token_config(),
    "token, loss": token_config(load_balance="loss"),
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("make", [llama, t5])
def test_checkpointing_with_two_forwards_before_one_backward(make, kind, use_reentrant):
    inputs = batch(make.__name__)
    first_ids, second_ids = torch.tensor([2, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = inject_rank_experts(make(), CHECKPOINTED[kind]).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with_ids = [{"task_ids": ids} if kind == "task" else {} for ids in (first_ids, second_ids)]
        losses = [model(**inputs, **ids).loss for ids in with_ids]
        (losses[0] + 2 * losses[1]).backward()
        loads = {
            path: layer.scope.take_load(layer.path, "default")
            for path, layer in adapted_layers(model)
            if layer.scope.loads
        }
        runs.append((losses, gradients(model), loads))
    (losses, plain, loads), (again, checkpointed, loads_again) = runs
    torch.testing.assert_close(again, losses)
    assert_same_gradients(checkpointed, plain)
    assert loads.keys() == loads_again.keys()
    assert all(torch.equal(loads[path], loads_again[path]) for path in loads)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_block_checkpointed_by_hand_says_what_to_do(use_reentrant):
    model = inject_rank_experts(
        CheckpointedBlock(use_reentrant), task_config(target_modules=["proj"], contrastive_coef=0.0)
    ).train()
    x = torch.randn(2, 6, requires_grad=True)
    out = model(x, task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="Where activations are checkpointed by hand"):
        out.sum().backward()
    with use_task(model, torch.tensor([0, 1])):
        model(x).sum().backward()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_forward_that_is_all_of_a_step_counts_its_whole_auxiliary_loss(name):
    # Trainer's count leaves out the first label of causal models, which they shift, and of no others.
    model = inject_rank_experts(MODELS[name](), task_config()).train()
    inputs = batch(name) | {"task_ids": torch.tensor([0, 1, 2, 0])}
    labels = inputs["labels"] if name == "t5" else inputs["labels"][:, 1:]
    torch.manual_seed(1)  # T5 drops out.
    alone = model(**inputs).rank_expert_loss
    torch.manual_seed(1)
    counted = model(**inputs, num_items_in_batch=(labels != -100).sum()).rank_expert_loss
    torch.testing.assert_close(counted, alone)
