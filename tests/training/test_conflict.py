"""Whether tasks conflict, on tasks of which it is known; and that the model is afterwards what it was."""

from __future__ import annotations

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.training import TaskMixture, task_conflict
from rank_experts.training.conflict import TaskConflict
from rank_experts.training.trials import Adapters

WIDTH, TASKS = 24, ["add", "move", "turn"]


class Layer(nn.Module):
    """A frozen linear layer and, behind it, a head that is trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.head.weight)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, labels=None):
        y = self.head(self.layer(self.dropout(x)))
        return SequenceClassifierOutput(loss=None if labels is None else F.mse_loss(y, labels), logits=y)


def examples(model, task, conflict, visible, count=160, seed=0):
    """Inputs of one subspace, whose outputs are the task's own (conflict) or everybody's; a sign of the task beside."""
    generator = torch.Generator().manual_seed(seed + 7 * task)
    z = torch.randn(count, 4, generator=generator)
    x = torch.cat([z, torch.zeros(count, WIDTH - 4)], dim=1)
    x[:, 4 + task] += 3.0 * visible
    update = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 + (task if conflict else 0)))
    y = (model.layer(x) + z @ update).detach()
    return [{"x": a, "labels": b} for a, b in zip(x, y)]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def found(conflict, visible=1.0, **changed):
    torch.manual_seed(0)
    model = Layer()
    mixture = {name: examples(model, i, conflict, visible) for i, name in enumerate(TASKS)}
    values = {"target_modules": ["layer"], "r": 4, "alpha": 8, "learning_rate": 2e-2, "steps": 60, "batch_size": 8}
    return task_conflict(model, mixture, collate, **values | {"seeds": (0, 1, 2)} | changed)


@pytest.mark.parametrize(("visible", "word"), [(1.0, "token router"), (0.0, "MoRE")])
def test_tasks_that_want_different_outputs_conflict(visible, word):
    conflict = found(conflict=True, visible=visible)
    assert conflict.verdict == "conflict"
    assert conflict.tasks == TASKS
    # No single matrix can do more than the mean of three updates; an adapter each leaves next to nothing.
    assert conflict.room > 0.4 * conflict.learnt
    # An output of the update has variance 4; the average over 24 outputs of three tasks is near it.
    assert conflict.start.mean() == pytest.approx(4, abs=1)
    assert (conflict.shared > conflict.alone).all()
    assert (conflict.visible > 0.99) == bool(visible)
    assert word in conflict.advice
    # Around the best compromise tasks pull apart: three that sum to nothing are at -1/2.
    (cosines,) = conflict.cosines.values()
    assert list(conflict.cosines) == ["layer"]
    assert conflict.common["layer"] > 0.9  # They read the same subspace.
    off = cosines[~torch.eye(3, dtype=torch.bool)]
    assert off.mean() == pytest.approx(-0.5, abs=0.2)


def test_tasks_with_one_update_do_not():
    conflict = found(conflict=False)
    assert conflict.verdict == "none"
    assert "One LoRA is enough" in conflict.advice
    # Each adapter sees a third of what the common one sees of the one update that all of them need.
    assert conflict.room + conflict.half < 0
    (cosines,) = conflict.cosines.values()
    assert cosines[~torch.eye(3, dtype=torch.bool)].mean() > 0


def test_the_interval_decides():
    losses = {"start": torch.tensor([2.0]), "shared": torch.tensor([1.1]), "alone": torch.tensor([1.0])}
    values = {"tasks": ["a"], **losses, "visible": 1.0, "cosines": {}, "common": {}}  # 0.05 of what is learnt counts
    assert TaskConflict(room=0.1, half=0.04, **values).verdict == "conflict"
    assert TaskConflict(room=0.1, half=0.06, **values).verdict == "unclear"
    assert TaskConflict(room=0.0, half=0.04, **values).verdict == "none"
    assert TaskConflict(room=-0.5, half=0.3, **values).verdict == "none"
    text = str(TaskConflict(room=0.1, half=0.06, **values))
    assert "room: +0.1000 ± 0.0600, of 1.0000 that training takes off the loss" in text
    assert "unclear: It cannot be told: the interval" in text
    nothing = TaskConflict(room=0.1, half=0.01, **values | {"start": torch.tensor([0.9])})
    assert (nothing.verdict, "nothing was learnt" in nothing.advice) == ("unclear", True)


def test_layers_are_named_those_first_that_pull_tasks_apart_most(tmp_path):
    apart, together = torch.tensor([[1.0, -0.4], [-0.4, 1.0]]), torch.tensor([[1.0, 0.2], [0.2, 1.0]])
    cosines = {"together": together, "noise": torch.full((2, 2), torch.nan), "apart": apart}
    common = {"together": 0.25, "noise": torch.nan, "apart": 0.75}
    losses = {"start": torch.tensor([2.0, 2.0]), "shared": torch.tensor([1.1, 1.3]), "alone": torch.tensor([1.0, 1.0])}
    values = {"tasks": ["a", "b\x1b"], **losses, "room": 0.2, "half": 0.0, "visible": 1.0}
    conflict = TaskConflict(**values, cosines=cosines, common=common)
    assert [layer.path for layer in conflict.layers] == ["apart", "together", "noise"]
    assert conflict.layer_rows()[1:] == [["apart", "-0.40", "75%"], ["together", "+0.20", "25%"], ["noise", "", ""]]
    assert conflict.mean_cosines[0, 1] == pytest.approx(-0.1)
    text = str(conflict)
    assert text.index("apart  ") < text.index("together  ") < text.index("noise")
    assert "b\\x1b" in text
    conflict.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == conflict.to_html()
    assert page.count("-0.10") == 2
    assert "conflict: Route" in page


def test_it_says_early_how_long_it_takes(monkeypatch):
    expected, steps = [], []
    train = Adapters.train

    def watched(self, examples, rate, count, seed, stepped=None):
        train(self, examples, rate, count, seed, lambda step: (steps.append(step), stepped(step)))

    monkeypatch.setattr(Adapters, "train", watched)
    start = time.perf_counter()
    found(conflict=True, steps=40, expect=lambda seconds: expected.append((seconds, len(steps))))
    took = time.perf_counter() - start
    ((seconds, at),) = expected
    assert at == 4
    assert took / 5 < seconds < took * 5


def test_the_model_is_afterwards_what_it_was():
    torch.manual_seed(0)
    model = Layer()
    model.layer.requires_grad_(False)
    model.dropout.eval()
    mixture = {name: examples(model, i, True, 1.0, count=40) for i, name in enumerate(TASKS)}
    before = copy.deepcopy(model)
    layer = model.layer
    state = torch.get_rng_state()
    task_conflict(model, mixture, collate, target_modules=["layer"], trained=["head"], steps=3, seeds=(0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.layer is layer
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert not hasattr(model, "peft_config")
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old), name
        assert parameter.requires_grad == old.requires_grad, name
        assert parameter.grad is None
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]


def test_it_is_left_as_it_was_where_something_fails():
    model = Layer()
    mixture = {name: examples(model, i, True, 1.0, count=40) for i, name in enumerate(TASKS)}
    before = copy.deepcopy(model.state_dict())

    def without_labels(rows):
        return {"x": torch.stack([row["x"] for row in rows])}

    with pytest.raises(ValueError, match="no loss: does the collator give"):
        task_conflict(model, mixture, without_labels, target_modules=["layer"], trained=["head"], steps=3)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_both_ways_train_the_same_head_and_the_same_ranks(monkeypatch):
    counts, heads = [], []
    train = Adapters.train

    def counted(self, *args):
        before = self.model.base_model.model.head.weight.clone()
        train(self, *args)
        counts.append(sum(parameter.numel() for _, parameter in self.parameters()))
        heads.append((before, self.model.base_model.model.head.weight.clone()))

    monkeypatch.setattr(Adapters, "train", counted)
    found(conflict=True, trained=["head"], steps=2, seeds=(0, 1))
    assert counts == [3 * 4 * 2 * WIDTH] * 4
    for before, after in heads:
        assert torch.equal(before, torch.eye(WIDTH))
        assert not torch.equal(after, before)


def test_a_model_that_knows_tasks_is_told():
    seen = []

    class Told(Layer):
        def forward(self, x, labels=None, task_ids=None):
            seen.append(task_ids.unique().tolist())
            return super().forward(x, labels)

    model = Told()
    mixture = TaskMixture({name: examples(model, i, True, 1.0, count=40) for i, name in enumerate(TASKS)})
    task_conflict(model, mixture, collate, target_modules=["layer"], steps=2, seeds=(0, 1))
    assert all(len(ids) == 1 for ids in seen)
    assert {ids[0] for ids in seen} == {0, 1, 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixture": {"add": [{"x": torch.zeros(WIDTH), "labels": torch.zeros(WIDTH)}] * 40}}, "at least two tasks"),
        ({"seeds": (0,)}, r"seeds=\[0\]: expected 2 to 10"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"batch_size": 20}, "Task 'add' has 40 examples: too few for batches of 20"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed, message):
    model = Layer()
    mixture = {name: examples(model, i, True, 1.0, count=40) for i, name in enumerate(TASKS)}
    values = {
        "model": model,
        "mixture": mixture,
        "collator": collate,
        "target_modules": ["layer"],
        "steps": 2,
    } | changed
    with pytest.raises(ValueError, match=message):
        task_conflict(**values)


@pytest.mark.parametrize("ours", [True, False])
def test_an_adapted_model_is_refused(ours):
    model = Layer()
    mixture = {name: examples(model, i, True, 1.0, count=40) for i, name in enumerate(TASKS)}
    if ours:
        inject_rank_experts(model, RankExpertConfig.smora(r=4, top_k=2, target_modules=["layer"]))
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match="has an adapter already"):
        task_conflict(model, mixture, collate, target_modules=["layer"])
