"""A row's channel is its task. Needs no ms-swift."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from models import llama
from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.integrations.swift.channels import channel_ids, check_dataset, default_task, generate_by_channel

TASKS = ["upper", "lower"]
PROMPTS = torch.tensor([[5, 9, 20], [7, 30, 11]])
OPTIONS = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(PROMPTS))


def test_channels_become_ids_in_the_tasks_order():
    assert channel_ids(["lower", "upper", "lower"], TASKS, 3) == [1, 0, 1]


def test_one_task_may_be_left_out():
    assert channel_ids(None, ["upper"], 2) == [0, 0]
    assert channel_ids([None, "upper"], ["upper"], 2) == [0, 0]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (None, "no \"channel\", .* expected one of 'upper', 'lower'"),
        (["upper", None], 'no "channel"'),
        (["upper", "lowerr"], "'lowerr', which is no task: expected one of 'upper', 'lower'. The nearest is 'lower'"),
        (["upper", 1], '"channel": 1, which is no task'),
        (["upper"], "1 channels for 2 rows"),
    ],
)
def test_what_names_no_task_is_refused(channels, message):
    with pytest.raises(ValueError, match=message):
        channel_ids(channels, TASKS, 2)


def test_an_unknown_channel_is_refused_where_there_is_one_task_too():
    with pytest.raises(ValueError, match="'lower', which is no task"):
        channel_ids(["lower"], ["upper"], 1)


def test_a_dataset_is_checked_before_training():
    rows = [{"messages": "a", "channel": "upper"}, {"messages": "b", "channel": "lower"}]
    check_dataset(Dataset.from_list(rows), TASKS)
    check_dataset(SimpleNamespace(dataset=Dataset.from_list(rows)), TASKS)
    check_dataset(None, TASKS)
    check_dataset(iter(rows), TASKS)  # a stream
    with pytest.raises(ValueError, match="'lower', which is no task"):
        check_dataset(SimpleNamespace(dataset=Dataset.from_list(rows)), ["upper"])
    with pytest.raises(ValueError, match='no "channel"'):
        check_dataset(Dataset.from_list([*rows, {"messages": "c", "channel": None}]), TASKS)
    with pytest.raises(ValueError, match='no "channel"'):
        check_dataset(Dataset.from_list([{"messages": "a"}]), TASKS)


def test_the_default_task_must_exist():
    assert default_task("", TASKS) is None
    assert default_task("lower", TASKS) == "lower"
    with pytest.raises(ValueError, match=r"RANK_EXPERTS_TASK='lowr': expected one of 'upper', 'lower'. The nearest"):
        default_task("lowr", TASKS)
    with pytest.raises(ValueError, match="does not route by task"):
        default_task("lower", [])


@pytest.fixture
def model():
    config = RankExpertConfig.more(tasks=TASKS, r=8, alpha=64, target_modules="all-linear", init_weights=False)
    return inject_rank_experts(llama(), config).eval()


def test_generation_routes_each_row_by_its_channel(model):
    plain = model.generate
    ours = generate_by_channel(plain, TASKS, default=None)
    mixed = plain(PROMPTS, task_ids=torch.tensor([1, 0]), **OPTIONS)
    assert not torch.equal(mixed, plain(PROMPTS, task_ids=torch.tensor([0, 1]), **OPTIONS))
    assert torch.equal(ours(PROMPTS, channel=["lower", "upper"], **OPTIONS), mixed)
    assert torch.equal(ours(input_ids=PROMPTS, channel=["lower", "upper"], **OPTIONS), mixed)
    assert torch.equal(ours(PROMPTS, task_ids=torch.tensor([1, 0]), **OPTIONS), mixed)


def test_rows_without_a_channel_use_the_default_task(model):
    plain = model.generate
    ours = generate_by_channel(plain, TASKS, default="lower")
    assert torch.equal(ours(PROMPTS, **OPTIONS), plain(PROMPTS, task_ids=torch.tensor([1, 1]), **OPTIONS))
    mixed = plain(PROMPTS, task_ids=torch.tensor([0, 1]), **OPTIONS)
    assert torch.equal(ours(PROMPTS, channel=["upper", None], **OPTIONS), mixed)


def test_generation_without_a_task_says_how_to_name_one(model):
    ours = generate_by_channel(model.generate, TASKS, default=None)
    with pytest.raises(ValueError, match=r'Give the rows a "channel", or .*{"rank_experts_task": "upper"}'):
        ours(PROMPTS, **OPTIONS)


def test_an_adapter_without_tasks_ignores_channels():
    model = llama().eval()
    ours = generate_by_channel(model.generate, [], default=None)
    assert torch.equal(ours(PROMPTS, channel=["upper", "x"], **OPTIONS), model.generate(PROMPTS, **OPTIONS))
