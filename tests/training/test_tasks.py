"""Mixtures, sampling laws, the order of an epoch, and the collator."""

from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import default_data_collator

from rank_experts.training.mixtures import LAWS, TaskCollator, TaskMixture, TaskSampler, sampling_weights


def mixture(**sizes):
    return TaskMixture({name: [{"x": 100 * t + i} for i in range(n)] for t, (name, n) in enumerate(sizes.items())})


def ids(*sizes):
    return [task for task, n in enumerate(sizes) for _ in range(n)]


def test_mixture_joins_datasets_and_names_their_tasks():
    mixed = mixture(cola=2, rte=3)
    assert len(mixed) == 5
    assert [mixed[i] for i in (0, 1, 2, 4)] == [
        {"x": 0, "task_ids": 0},
        {"x": 1, "task_ids": 0},
        {"x": 100, "task_ids": 1},
        {"x": 102, "task_ids": 1},
    ]
    assert mixed.task_ids.tolist() == [0, 0, 1, 1, 1]
    assert [example["task_ids"] for example in (mixed.parts["rte"][i] for i in range(3))] == [1, 1, 1]
    with pytest.raises(IndexError):
        mixed[5]


def test_mixture_takes_ids_from_the_adapters_tasks():
    mixed = TaskMixture({"rte": [{"x": 1}]}, tasks=["cola", "mnli", "rte"])
    assert mixed[0]["task_ids"] == 2
    with pytest.raises(ValueError, match="nearest is 'rte'"):
        TaskMixture({"rtee": [{"x": 1}]}, tasks=["cola", "rte"])


def test_mixture_refuses_what_it_cannot_sample():
    with pytest.raises(ValueError, match="'rte' has no examples"):
        TaskMixture({"cola": [{"x": 1}], "rte": []})
    with pytest.raises(ValueError, match="at least one dataset"):
        TaskMixture({})
    with pytest.raises(TypeError, match=r"'rte'.*map-style"):
        TaskMixture({"rte": iter([{"x": 1}])})
    with pytest.raises(TypeError, match="'rte', example 0 is a int"):
        TaskMixture({"rte": [7]})[0]


def test_sampling_laws_are_their_formulas():
    sizes = [100, 300, 600]
    e = [math.exp(0.1), math.exp(0.3), math.exp(0.6)]
    roots = [math.sqrt(n) for n in sizes]
    expected = {
        "proportional": [0.1, 0.3, 0.6],
        "uniform": [1 / 3] * 3,
        "temperature": [root / sum(roots) for root in roots],
        "balanced": [value / sum(e) for value in e],
    }
    assert expected.keys() == set(LAWS)
    for law, shares in expected.items():
        torch.testing.assert_close(sampling_weights(sizes, law, 2.0), torch.tensor(shares, dtype=torch.float64))
    with pytest.raises(ValueError, match="nearest is 'balanced'"):
        sampling_weights(sizes, "balance")
    with pytest.raises(ValueError, match="temperature=0"):
        sampling_weights(sizes, "temperature", 0)


@pytest.mark.parametrize("law", LAWS)
def test_an_epoch_has_each_tasks_share(law):
    sampler = TaskSampler(ids(10, 30, 61), batch_size=4, law=law)
    counts = collections.Counter(ids(10, 30, 61)[i] for i in sampler)
    assert sampler.counts() == dict(counts)
    assert sum(counts.values()) == len(sampler) == 100
    for task, weight in enumerate(sampling_weights([10, 30, 61], law)):
        assert abs(counts[task] - 100 * float(weight)) < 1


def test_proportional_visits_every_example_once_and_goes_on_next_epoch():
    sampler = TaskSampler(ids(12, 20), batch_size=8, law="proportional")
    first = list(sampler)
    assert sorted(first) == list(range(32))
    # A task that an epoch draws fewer of than it has continues where it stopped.
    short = TaskSampler(ids(12, 20), batch_size=4, law="proportional", epoch_size=16)
    seen = list(short)
    short.set_epoch(1)
    seen += list(short)
    assert sorted(seen) == list(range(32))


def test_small_tasks_repeat_only_after_all_their_examples():
    sampler = TaskSampler(ids(3, 300), batch_size=10, law="uniform", epoch_size=60)
    small = [i for i in sampler if i < 3]
    assert len(small) == 30
    assert set(collections.Counter(small).values()) == {10}


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed=0, epoch=0):
        sampler = TaskSampler(ids(30, 50), batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order() == order()
    assert order() != order(seed=1)
    assert order() != order(epoch=1)
    torch.manual_seed(5)
    assert order() == order(seed=0)


@pytest.mark.parametrize("lengths", [None, [i % 37 for i in range(90)]])
def test_batches_of_one_task(lengths):
    task_of = ids(30, 60)
    sampler = TaskSampler(task_of, batch_size=5, mixed=False, lengths=lengths)
    batches = torch.tensor(list(sampler)).view(-1, 5)
    assert all(len({task_of[i] for i in batch}) == 1 for batch in batches.tolist())
    order = [task_of[batch[0]] for batch in batches.tolist()]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


@pytest.mark.parametrize("mixed", [True, False])
def test_length_buckets_save_padding_and_change_no_counts(mixed):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (400,), generator=generator)
    plain = TaskSampler(ids(100, 300), batch_size=8, mixed=mixed)
    bucketed = TaskSampler(ids(100, 300), batch_size=8, lengths=lengths, mixed=mixed)

    def padded(sampler):
        return int(lengths[torch.tensor(list(sampler)).view(-1, 8)].amax(1).sum())

    assert padded(bucketed) < 0.65 * padded(plain)
    assert sorted(bucketed) == sorted(plain)


@pytest.mark.parametrize("mixed", [True, False])
def test_ranks_share_an_epoch_without_overlap(mixed):
    whole = TaskSampler(ids(40, 60), batch_size=4, law="proportional", mixed=mixed, num_replicas=3)
    ranks = [
        list(TaskSampler(ids(40, 60), 4, "proportional", mixed=mixed, num_replicas=3, rank=rank)) for rank in range(3)
    ]
    assert len({len(own) for own in ranks}) == 1
    assert len(set().union(*ranks)) == sum(map(len, ranks)) == len(whole) == 96
    dealt = [
        batch for step in zip(*(torch.tensor(own).view(-1, 4).tolist() for own in ranks), strict=True) for batch in step
    ]
    assert [i for batch in dealt for i in batch] == list(whole)


def test_accelerate_deals_the_stream_out_to_the_same_ranks():
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    data = mixture(cola=40, rte=60)

    def loader(rank):
        sampler = TaskSampler(data.task_ids, 4, num_replicas=3)
        plain = DataLoader(data, batch_size=4, sampler=sampler, collate_fn=TaskCollator(default_data_collator))
        prepared = prepare_data_loader(plain, num_processes=3, process_index=rank, put_on_device=False)
        return prepared, sampler

    for rank in range(3):
        prepared, _ = loader(rank)
        prepared.set_epoch(2)
        own = TaskSampler(data.task_ids, 4, num_replicas=3, rank=rank)
        own.set_epoch(2)
        expected = [data[i]["x"] for i in own]
        assert len(prepared) == own.batches_per_epoch == 8
        assert [int(x) for batch in prepared for x in batch["x"]] == expected
        # What Trainer does to resume; the sampler's epoch is then out of accelerate's sight.
        resumed = skip_first_batches(loader(rank)[0], 3)
        resumed.batch_sampler.batch_sampler.batch_sampler.sampler.set_epoch(2)
        assert [int(x) for batch in resumed for x in batch["x"]] == expected[12:]


def test_resuming_in_an_epoch_leaves_out_what_was_seen():
    sampler = TaskSampler(ids(40, 60), batch_size=4, num_replicas=2, rank=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, first_batch=5)
    assert list(sampler) == whole[20:]
    with pytest.raises(ValueError, match="an epoch has 12 batches"):
        sampler.set_epoch(3, first_batch=13)


def test_an_epoch_is_as_long_as_one_place_says():
    sampler = TaskSampler(ids(40, 63), batch_size=4, num_replicas=3)
    assert sampler.batches_per_epoch == 103 // 12
    assert len(sampler) == len(list(sampler)) == 8 * 12
    assert len(TaskSampler(ids(40, 63), 4, num_replicas=3, rank=0)) == 32
    assert len(TaskSampler(ids(3), batch_size=8)) == 8
    assert TaskSampler(ids(40), batch_size=4, epoch_size=100).batches_per_epoch == 25


def test_sampler_refuses_bad_arguments():
    with pytest.raises(ValueError, match="lengths"):
        TaskSampler(ids(4), 2, lengths=[1, 2])
    with pytest.raises(ValueError, match="rank=2"):
        TaskSampler(ids(4), 2, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        TaskSampler(ids(4), 0)
    with pytest.raises(ValueError, match="at least one"):
        TaskSampler([], 1)


def test_collator_carries_task_ids_and_hides_them():
    def collator(features):
        assert all("task_ids" not in feature for feature in features)
        return default_data_collator(features)

    batch = TaskCollator(collator)([{"x": 1, "task_ids": 2}, {"x": 5, "task_ids": 0}])
    assert batch["task_ids"].tolist() == [2, 0]
    assert batch["task_ids"].dtype == torch.int64
    assert batch["x"].tolist() == [1, 5]


def test_collator_refuses_batches_that_teach_nothing():
    collator = TaskCollator(default_data_collator)
    with pytest.raises(ValueError, match="TaskMixture"):
        collator([{"x": 1}])
    with pytest.raises(ValueError, match=r"tasks \[1\] is all padding"):
        collator([{"input_ids": [0, 0], "attention_mask": [0, 0], "task_ids": 1}] * 2)
    with pytest.raises(ValueError, match="no label that counts"):
        collator([{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, -100], "task_ids": 1}])
    ignored = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 3], "task_ids": 1}
    assert collator([ignored])["labels"].tolist() == [[-100, 3]]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_task_too_small_for_an_epoch_is_drawn_in_another(mixed):
    sampler = TaskSampler(ids(3, 3000, 200), batch_size=4, law="proportional", epoch_size=80, mixed=mixed)
    unit = 1 if mixed else 4
    total = collections.Counter()
    for epoch in range(400):
        counts = sampler.counts(epoch)
        assert sum(counts.values()) == 80
        total.update(counts)
    for task, weight in enumerate(sampler.weights.tolist()):
        assert abs(total[task] - 400 * 80 * weight) <= 4 * unit
    drawn = [epoch for epoch in range(400) if sampler.counts(epoch)[0]]
    assert max(b - a for a, b in itertools.pairwise(drawn)) < 3 * 400 / len(drawn)
    # It goes on where it stopped, over however many epochs without it.
    seen = []
    for epoch in drawn[:3]:
        sampler.set_epoch(epoch)
        seen += [i for i in sampler if i < 3]
    assert len(seen) == 3 * unit
    assert set(collections.Counter(seen).values()) == {unit}


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.sampled_from(LAWS),
    st.integers(1, 7),
    st.integers(0, 40),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_the_shares_and_each_task_walks_through_its_examples(sizes, law, batch_size, epoch, mixed):
    sampler = TaskSampler(ids(*sizes), batch_size, law, epoch_size=3 * batch_size, mixed=mixed)
    unit = 1 if mixed else batch_size
    walks = [[] for _ in sizes]
    for past in range(epoch + 1):
        counts = sampler.counts(past)
        assert sum(counts.values()) == len(sampler)
        for task, weight in enumerate(sampler.weights.tolist()):
            assert abs(counts[task] - len(sampler) * weight) < unit + 1e-6
        if epoch - past < 2:
            order = sampler.order(past).tolist()
            assert collections.Counter(ids(*sizes)[i] for i in order) == {t: n for t, n in counts.items() if n}
            for i in order:
                walks[ids(*sizes)[i]].append(i)
    for task, size in enumerate(sizes):
        # Of two epochs in a row, none twice before all once: at most one pass more for one example than another.
        seen = collections.Counter(walks[task])
        assert not seen or max(seen.values()) <= -(-len(walks[task]) // size) + 1
