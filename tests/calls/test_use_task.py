"""use_task blocks that are left in any order, in generators, threads, tasks of asyncio and broken forwards."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import TASKS, task_config
from models import batch, llama
from rank_experts import inject_rank_experts, use_task
from rank_experts.calls.call import calls_from_inside
from rank_experts.calls.use_task import routing_scopes

PLANS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=12)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 5)

    def forward(self, x):
        return self.proj(x)


X = torch.ones(1, 6)


@pytest.fixture(scope="module")
def small():
    model = inject_rank_experts(Small(), task_config(target_modules=["proj"])).eval()
    adapter = model.proj.rank_experts["default"]
    with torch.no_grad():  # Task t chooses rank t + 1.
        adapter.task_embedding.copy_(torch.eye(3, 6))
        adapter.gate_weight.copy_(10 * torch.eye(4, 6))
        adapter.gate_bias.zero_()
    model.expected = [model(X, task_ids=task) for task in TASKS]
    return model


def task_of(model) -> int:
    """Which task a call without task_ids runs for; −1: none."""
    try:
        y = model(X)
    except ValueError:
        return -1
    return next(i for i, expected in enumerate(model.expected) if torch.equal(y, expected))


def nothing_is_open() -> bool:
    return next(calls_from_inside(), None) is None


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_blocks_that_are_entered_and_left_in_any_order(small, plan):
    """What runs, runs for the block that was entered last of those still open; leaving out of order is said."""
    open_blocks: list[tuple[int, object]] = []
    for task, which, enter in plan:
        if enter or not open_blocks:
            block = use_task(small, TASKS[task])
            block.__enter__()
            open_blocks.append((task, block))
        else:
            which %= len(open_blocks)
            _, block = open_blocks.pop(which)
            if which == len(open_blocks):
                block.__exit__(None, None, None)
            else:
                with pytest.raises(RuntimeError, match="left while one that was entered later is still open"):
                    block.__exit__(None, None, None)
        assert task_of(small) == (open_blocks[-1][0] if open_blocks else -1)
    while open_blocks:
        open_blocks.pop()[1].__exit__(None, None, None)
    assert task_of(small) == -1
    assert nothing_is_open()


@settings(max_examples=60, deadline=None)
@given(tasks=st.lists(st.integers(0, 2), min_size=1, max_size=5), fails_at=st.integers(0, 5))
def test_an_exception_at_any_depth_ends_all_blocks(small, tasks, fails_at):
    def nest(depth):
        if depth == min(fails_at, len(tasks)):
            raise KeyError(depth)
        with use_task(small, TASKS[tasks[depth]]):
            assert task_of(small) == tasks[depth]
            nest(depth + 1)

    with pytest.raises(KeyError):
        nest(0)
    assert task_of(small) == -1
    assert nothing_is_open()


def running(model, task, steps=3):
    with use_task(model, TASKS[task]):
        for _ in range(steps):
            yield task_of(model)


@settings(max_examples=40, deadline=None)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_generators_that_take_turns_in_contexts_of_their_own(small, order):
    generators = [(contextvars.copy_context(), running(small, task, steps=20)) for task in range(3)]
    for task in order:
        context, generator = generators[task]
        assert context.run(next, generator) == task
    for context, generator in generators:
        context.run(generator.close)
    assert nothing_is_open()


def test_generators_that_take_turns_without_are_told(small):
    first, second = running(small, 0), running(small, 1)
    assert next(first) == 0
    assert next(second) == 1
    # The first one runs on for the second one's task, and is told when its block ends.
    assert [next(first), next(first)] == [1, 1]
    with pytest.raises(RuntimeError, match="Generators that take turns share their caller's calls"):
        next(first)
    second.close()
    assert task_of(small) == -1
    assert nothing_is_open()


@settings(max_examples=15, deadline=None)
@given(plans=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=4))
def test_tasks_of_asyncio_do_not_see_each_other(small, plans):
    async def one(tasks):
        for task in tasks:
            with use_task(small, TASKS[task]):
                await asyncio.sleep(0)
                assert task_of(small) == task
                await asyncio.sleep(0)
                assert task_of(small) == task
        assert task_of(small) == -1

    async def everything():
        await asyncio.gather(*(one(tasks) for tasks in plans))

    asyncio.run(everything())
    assert nothing_is_open()


def test_a_thread_starts_without_the_callers_task(small):
    found = []
    with use_task(small, "rte"):
        threading.Thread(target=lambda: found.append(task_of(small))).run()
        thread = threading.Thread(target=lambda: found.append(task_of(small)))
        thread.start()
        thread.join()
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(lambda: found.append(task_of(small))))
        thread.start()
        thread.join()
    assert found == [2, -1, 2]


def test_a_block_left_in_another_thread_than_it_was_entered_in(small):
    block = use_task(small, "rte")
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert task_of(small) == -1
    assert nothing_is_open()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, RuntimeError])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_forward_that_is_interrupted_leaves_no_call(error, replaced):
    """As by Ctrl-C in the middle of a layer, where a trainer has replaced the model's forward (TRL does) or not."""
    model = inject_rank_experts(llama(), task_config()).eval()
    inputs = batch("llama", labels=False)
    if replaced:
        model.forward = types.MethodType(type(model).forward, model)
    expected = model(**inputs, task_ids="rte").logits

    def interrupt(*args):
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(**inputs, task_ids="cola")
    handle.remove()
    with pytest.raises(ValueError, match="was not told which"):
        model(**inputs)
    with use_task(model, "rte"):
        assert torch.equal(model(**inputs).logits, expected)
    assert nothing_is_open()


def test_two_scopes_of_one_model_are_entered_together():
    """Parts that were injected apart each have a scope, and one block names the task for both."""
    parts = nn.ModuleList([inject_rank_experts(Small(), task_config(target_modules=["proj"])) for _ in range(2)])
    assert len(routing_scopes(parts)) == 2
    with use_task(parts, "rte"):
        for part in parts:
            assert torch.equal(part(X), part(X, task_ids="rte"))
    for part in parts:
        with pytest.raises(ValueError, match="was not told which"):
            part(X)
