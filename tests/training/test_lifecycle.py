"""Tasks that join an adapter, and tasks that are told from the inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import models
from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, save_rank_experts, use_task
from rank_experts.convert.merge import merge_rank_experts
from rank_experts.layers import adapted_layers
from rank_experts.training.heads import HeadSpec, MultiTaskClassifier
from rank_experts.training.lifecycle import add_task, identify_task

TASKS = ["cola", "rte"]


def more(**kwargs):
    values = dict(tasks=list(TASKS), r=4, target_modules="all-linear", init_weights=False)
    return RankExpertConfig.more(**values | kwargs)


def adapted(**kwargs):
    torch.manual_seed(3)
    return inject_rank_experts(models.llama(), more(**kwargs)).eval()


def logits(model, task):
    with use_task(model, task), torch.no_grad():
        return model(**models.batch("llama", labels=False)).logits


@pytest.mark.parametrize("scaling", ["linear", "quadratic", "none"])
def test_old_tasks_compute_what_they_did(scaling):
    model = adapted(rank_scaling=scaling, alpha_pattern={"q_proj": 5.0})
    before = {task: logits(model, task) for task in TASKS}
    add_task(model, "scitail", like="rte")
    add_task(model, "third")
    for task in TASKS:
        torch.testing.assert_close(logits(model, task), before[task])
    torch.testing.assert_close(logits(model, "scitail"), before["rte"])
    assert model.peft_config["default"].tasks == ["cola", "rte", "scitail", "third"]
    ids = torch.tensor([2, 2, 2, 2])
    torch.testing.assert_close(model(**models.batch("llama", labels=False), task_ids=ids).logits, before["rte"])


def test_a_new_task_starts_from_a_like_or_from_new():
    model = adapted()
    add_task(model, "scitail", like="cola")
    add_task(model, "other")
    for _, layer in adapted_layers(model):
        rows = layer.rank_experts["default"].task_embedding
        assert rows.shape == (4, layer.in_features)
        assert torch.equal(rows[2], rows[0])
        assert (rows[3] - rows[:3]).abs().sum(1).min() > 1


def test_training_the_embedding_changes_the_new_task_alone():
    model = adapted()
    add_task(model, "scitail", like="rte")
    before = {task: logits(model, task) for task in TASKS}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith("task_embedding") for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    for _ in range(3):
        model(**models.batch("llama"), task_ids=torch.tensor([2, 2, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for name, p in model.named_parameters():
        if name in trained:
            assert torch.equal(p[:2], start[name][:2])
            assert not torch.equal(p[2], start[name][2])
        else:
            assert torch.equal(p, start[name])
    for task in TASKS:
        assert torch.equal(logits(model, task), before[task])


def test_training_the_adapter_trains_all_of_it():
    model = adapted()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    add_task(model, "scitail", like="rte", train="adapter")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize("peft", [False, True])
def test_a_grown_adapter_is_saved_and_loaded(tmp_path, peft):
    torch.manual_seed(3)
    model = get_peft_model(models.llama(), more()) if peft else inject_rank_experts(models.llama(), more())
    add_task(model.eval(), "scitail", like="rte")
    for _, layer in adapted_layers(model):
        layer.rank_experts["default"].task_embedding.data[2] += torch.randn(layer.in_features)
    expected = {task: logits(model, task) for task in [*TASKS, "scitail"]}
    guess = identify_task(model, models.batch("llama", labels=False))
    if peft:
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(models.llama(), tmp_path).eval()
    else:
        save_rank_experts(model, tmp_path)
        loaded = load_rank_experts(models.llama(), tmp_path).eval()
    for task, value in expected.items():
        torch.testing.assert_close(logits(loaded, task), value)
    torch.testing.assert_close(identify_task(loaded, models.batch("llama", labels=False)).scores, guess.scores)


def test_add_task_refuses_and_changes_nothing():
    model = adapted()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="knows the task 'rte' already"):
        add_task(model, "rte")
    with pytest.raises(ValueError, match=r"like='rtee' is unknown.*nearest is 'rte'"):
        add_task(model, "scitail", like="rtee")
    with pytest.raises(ValueError, match="expected 'embedding' or 'adapter'"):
        add_task(model, "scitail", train="all")
    with pytest.raises(TypeError, match="non-empty strings"):
        add_task(model, "")
    with pytest.raises(ValueError, match=r"no rank-expert adapter 'other'; it has \['default'\]"):
        add_task(model, "scitail", adapter_name="other")
    merge_rank_experts(model, task="rte")
    with pytest.raises(ValueError, match="is merged"):
        add_task(model, "scitail")
    assert model.peft_config["default"].tasks == TASKS
    smora = inject_rank_experts(models.llama(), RankExpertConfig.smora(r=8, top_k=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="router='token'"):
        add_task(smora, "scitail")
    assert {name: p.shape for name, p in model.state_dict().items()} == {n: p.shape for n, p in state.items()}


def ranges(size: int, seed: int):
    """Task 0 writes low tokens, task 1 high ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(size) % 2
    tokens = torch.randint(2, models.VOCAB // 2, (size, 7), generator=generator) + ids[:, None] * (
        models.VOCAB // 2 - 2
    )
    mask = torch.ones_like(tokens)
    mask[1::3, -3:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}, ids


@pytest.mark.parametrize("width", [None, 12])
def test_the_contrastive_space_tells_tasks_apart(width):
    model = adapted(task_embedding_dim=width, contrastive_coef=1.0, init_weights=True)
    inputs, ids = ranges(128, seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(40):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels, task_ids=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unseen, ids = ranges(40, seed=1)
    guess = identify_task(model, unseen)
    assert model.training
    assert guess.scores.shape == (40, 2)
    torch.testing.assert_close(guess.scores.sum(-1), torch.ones(40))
    hits = [name == TASKS[t] for name, t in zip(guess.names, ids.tolist())]
    assert sum(hits) >= 36
    # Padding says nothing of the task.
    padded = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in unseen.items()}
    torch.testing.assert_close(identify_task(model, padded).scores, guess.scores, rtol=1e-3, atol=1e-3)


def test_identify_works_in_a_classifier_and_an_encoder_decoder():
    encoder = inject_rank_experts(models.bert().bert, more())
    classifier = MultiTaskClassifier(encoder, {task: HeadSpec(["no", "yes"]) for task in TASKS})
    add_task(classifier, "scitail", like="rte")
    classifier.add_head("scitail", HeadSpec(["no", "yes"]))
    assert identify_task(classifier, models.batch("bert", labels=False)).scores.shape == (4, 3)
    t5 = inject_rank_experts(models.t5(), more())
    assert identify_task(t5, models.batch("t5", labels=False)).scores.shape == (4, 2)


def test_identify_needs_a_contrastive_space():
    with pytest.raises(ValueError, match="contrastive_coef=0"):
        identify_task(adapted(contrastive_coef=0.0), models.batch("llama", labels=False))


def rows_with_gradients(model):
    model.zero_grad()
    model.train()(**models.batch("llama"), task_ids=torch.tensor([0, 1, 2, 2])).loss.backward()
    grads = [layer.rank_experts["default"].task_embedding.grad for _, layer in adapted_layers(model)]
    return (torch.stack([grad.abs().sum(1) for grad in grads if grad.shape[1] == 32]) > 0).any(0).tolist()


@pytest.mark.parametrize("way", ["copied", "sharded"])
def test_copies_and_shards_train_the_new_row_alone_too(way):
    model = adapted()
    add_task(model, "scitail", like="rte")
    model = copy.deepcopy(model)
    if way == "copied":
        assert rows_with_gradients(model) == [False, False, True]
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in model.model.layers:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        model.train()(**models.batch("llama"), task_ids=torch.tensor([0, 1, 2, 2])).loss.backward()
        for _, layer in adapted_layers(model):
            grad = layer.rank_experts["default"].task_embedding.grad.full_tensor()
            assert (grad.abs().sum(1) > 0).tolist() == [False, False, True]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", ["set_adapter", "by hand", "add_task"])
def test_an_adapter_that_is_unfrozen_later_trains_all_rows(way):
    model = get_peft_model(models.llama(), more())
    add_task(model, "scitail", like="rte")
    assert rows_with_gradients(model) == [False, False, True]
    if way == "set_adapter":
        model.set_adapter("default")
    elif way == "by hand":
        for _, layer in adapted_layers(model):
            layer.rank_experts["default"].requires_grad_(True)
    else:
        add_task(model, "fourth", train="adapter")
    assert rows_with_gradients(model) == [True, True, True] + ([True] if way == "add_task" else [])


def test_a_new_task_leaves_heads_around_the_adapter_trained_and_freezes_what_holds_it():
    encoder = inject_rank_experts(models.bert().bert, more(target_modules=["query", "value"]))
    for parameter in encoder.embeddings.parameters():
        parameter.requires_grad_(True)
    heads = {task: HeadSpec(["no", "yes"]) for task in TASKS}
    model = MultiTaskClassifier(encoder, heads)
    model.heads["head_cola"].requires_grad_(False)
    add_task(model, "scitail")
    model.add_head("scitail", HeadSpec(["no", "yes"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name in trained if name.startswith("encoder.")}
    assert own
    assert all(name.endswith("task_embedding") for name in own)
    assert trained - own == {f"heads.head_{task}.{leaf}" for task in ("rte", "scitail") for leaf in ("weight", "bias")}
