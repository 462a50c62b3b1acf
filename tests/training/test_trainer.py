"""Training on several tasks: metrics, logs, losses, groups, checkpoints, resuming."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import models
from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.calls.use_task import routing_scopes
from rank_experts.layers import adapted_layers
from rank_experts.training.callbacks import RankExpertCallback, SaveOnInterrupt
from rank_experts.training.heads import HeadSpec, MultiTaskClassifier
from rank_experts.training.metrics import METRICS, exact_match, find_metric
from rank_experts.training.mixtures import TaskMixture
from rank_experts.training.ranks import chosen_ranks
from rank_experts.training.trainer import RankExpertTrainer, RankExpertTrainerMixin

TASKS = ["first", "last"]
METRIC = {"first": "accuracy", "last": ["accuracy", "f1"]}


def examples(task: str, size: int = 24):
    generator = torch.Generator().manual_seed(len(task))
    rows = torch.randint(2, models.VOCAB, (size, 6), generator=generator)
    place = 0 if task == "first" else -1
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * 6, "labels": int(row[place] > models.VOCAB // 2)}
        for row in rows
    ]


def causal_examples(size: int = 24):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(2, models.VOCAB, (size, 6), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 6, "labels": [-100] * 3 + row[3:]} for row in rows]


def classifier(config=None):
    encoder = models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).bert
    config = config or RankExpertConfig.more(tasks=TASKS, r=4, target_modules=["query", "value"])
    return MultiTaskClassifier(
        inject_rank_experts(encoder, config), {name: HeadSpec(labels=["low", "high"]) for name in TASKS}
    )


def arguments(folder, **kwargs):
    values = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return TrainingArguments(**values | kwargs)


def trainer(folder, model=None, metrics=METRIC, args=None, **kwargs):
    train = TaskMixture({name: examples(name) for name in TASKS})
    validation = TaskMixture({name: examples(name, 10) for name in TASKS})
    return RankExpertTrainer(
        model or classifier(),
        arguments(folder, **args or {}),
        train_dataset=train,
        eval_dataset=validation,
        metrics=metrics,
        **kwargs,
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_metrics_are_right():
    labels, predictions = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    values = {name: METRICS[name](predictions, labels) for name in ("accuracy", "f1", "matthews")}
    assert values == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "matthews": 1 / math.sqrt(3)})
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0])
    assert METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert METRICS["spearman"](x, y) == pytest.approx(1)
    assert METRICS["pearson"](np.ones(3), y) == METRICS["spearman"](np.ones(3), y) == 0
    labels = np.array([[-100, 5, 6], [-100, 5, 6], [-100, -100, -100]])
    assert exact_match(np.array([[9, 5, 6], [9, 5, 7], [1, 1, 1]]), labels) == 0.5
    assert METRICS["accuracy"](np.array([[9, 5, 6], [9, 5, 7], [1, 1, 1]]), labels) == 0.75
    with pytest.raises(ValueError, match="nearest is 'matthews'"):
        find_metric("mathews")


def test_evaluation_by_task_and_the_mean(tmp_path):
    run = trainer(tmp_path, args=dict(eval_strategy="steps", eval_steps=2, metric_for_best_model="mean"))
    results = run.evaluate()
    task_means = [results["eval_first_accuracy"], (results["eval_last_accuracy"] + results["eval_last_f1"]) / 2]
    assert results["eval_mean"] == pytest.approx(sum(task_means) / 2)
    model = run.model.eval()
    for task_id, name in enumerate(TASKS):
        rows = examples(name, 10)
        logits = model(
            input_ids=torch.tensor([row["input_ids"] for row in rows]),
            attention_mask=torch.ones(10, 6),
            task_ids=torch.full((10,), task_id),
        ).logits
        hits = logits[:, :2].argmax(-1) == torch.tensor([row["labels"] for row in rows])
        assert results[f"eval_{name}_accuracy"] == pytest.approx(float(hits.float().mean()))
    run.train()
    assert run.state.best_metric == max(log["eval_mean"] for log in run.state.log_history if "eval_mean" in log)


def test_metrics_must_fit_the_tasks(tmp_path):
    with pytest.raises(ValueError, match=r"'firs'.*nearest is 'first'"):
        trainer(tmp_path, metrics={"firs": "accuracy"})
    with pytest.raises(ValueError, match=r"lacks the tasks \['last'\]"):
        trainer(tmp_path, metrics={"first": "accuracy"})
    with pytest.raises(ValueError, match="Unknown metric"):
        trainer(tmp_path, metrics={"first": "acc", "last": "accuracy"})


def test_token_metrics_follow_the_shift_of_causal_models(tmp_path):
    config = RankExpertConfig.smora(r=8, top_k=2, target_modules="all-linear")
    model = inject_rank_experts(models.llama(), config)
    data = TaskMixture({"copy": causal_examples()})
    run = RankExpertTrainer(
        model, arguments(tmp_path), train_dataset=data, eval_dataset=data, metrics={"copy": ["accuracy", "exact_match"]}
    )
    results = run.evaluate()
    rows = torch.tensor([row["input_ids"] for row in causal_examples()])
    hits = (model.eval()(rows).logits.argmax(-1)[:, 2:-1] == rows[:, 3:]).float()
    assert results["eval_copy_accuracy"] == pytest.approx(float(hits.mean()))
    assert results["eval_copy_exact_match"] == pytest.approx(float(hits.prod(1).mean()))


def test_loads_losses_and_ranks_are_logged(tmp_path):
    run = trainer(tmp_path, args=dict(report_to=["tensorboard"]))
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 2
    assert all(log["auxiliary_loss"] > 0.01 for log in logs)
    assert logs[-1]["rank_first"] == chosen_ranks(run.model)["rank_first"]
    smora = RankExpertConfig.smora(r=8, top_k=2, target_modules=["query", "value"], balance_rate=0.1)
    run = trainer(tmp_path, classifier(smora))
    run.train()
    log = next(log for log in run.state.log_history if "loss" in log)
    assert 0 < log["load_cv"] < 4
    assert 1 <= log["load_max"] <= 4
    assert "auxiliary_loss" not in log
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(path.parent for path in tmp_path.rglob("events.out.*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/auxiliary_loss", "train/rank_first"} <= set(events.Tags()["scalars"])


def test_logs_leave_gates_alone_that_lie_in_parts_between_forwards():
    """ZeRO-3 leaves parameters empty and marks them; FSDP2 makes DTensors of them."""
    config = RankExpertConfig.more(tasks=TASKS, r=4, target_modules=["q_proj", "v_proj"])
    model = inject_rank_experts(models.llama(), config)
    whole = chosen_ranks(model)
    assert set(whole) == {"rank_first", "rank_last"}
    sharded = copy.deepcopy(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert chosen_ranks(sharded) == {}
    finally:
        dist.destroy_process_group()
    for layer in model.model.layers:
        for parameter in layer.parameters():
            parameter.ds_id = 0
            parameter.data = torch.empty(0)
    assert chosen_ranks(model) == {}


def test_load_statistics_are_their_definitions(monkeypatch):
    callback = RankExpertCallback()
    loads = {("a", "default"): torch.tensor([3.0, 1.0, 1.0, 0.0, 0.0]), ("unused", "default"): torch.zeros(5)}
    monkeypatch.setattr("rank_experts.training.callbacks.update_router_bias", lambda model: loads)
    for _ in range(2):
        callback.on_optimizer_step(None, TrainerState(), None, model=torch.nn.Linear(1, 1))
    share = np.array([3, 1, 1, 0, 0])
    expected = {"load_cv": share.std(), "load_max": 3.0, "load_idle": 0.4}
    assert callback.take_statistics() == pytest.approx(expected, abs=1e-4)
    assert callback.take_statistics() == {}


def test_the_bias_moves_once_a_step(tmp_path):
    smora = RankExpertConfig.smora(r=8, top_k=2, target_modules=["query"], balance_rate=0.5)
    run = trainer(tmp_path, classifier(smora), args=dict(max_steps=1, gradient_accumulation_steps=2))
    run.train()
    biases = torch.cat([layer.rank_experts["default"].balance_bias for _, layer in adapted_layers(run.model)])
    assert set(biases.tolist()) <= {-0.5, 0.0, 0.5}
    assert biases.abs().sum() > 0


def gradients(run):
    grads = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    run.add_callback(Keep())
    run.train()
    return grads


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_keeps_the_auxiliary_loss(tmp_path, accumulation):
    # The gradient of task embeddings beyond the straight-through path comes from the contrastive loss alone; with
    # B = 0 that path is closed, so the two runs must agree on it whatever the task's loss is.
    def embeddings(smoothing):
        config = RankExpertConfig.more(tasks=TASKS, r=4, target_modules=["q_proj", "v_proj"])
        data = TaskMixture({name: causal_examples(16) for name in TASKS})
        run = RankExpertTrainer(
            inject_rank_experts(models.llama(), config),
            arguments(
                tmp_path,
                max_steps=1,
                label_smoothing_factor=smoothing,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0.0,
            ),
            train_dataset=data,
        )
        return {name: grad for name, grad in gradients(run).items() if name.endswith("task_embedding")}

    plain, smoothed = embeddings(0.0), embeddings(0.2)
    assert plain
    for name, grad in plain.items():
        assert grad.abs().sum() > 0
        torch.testing.assert_close(smoothed[name], grad)


class Reads(Trainer):
    """Logs, and takes the loss from `Trainer`, as a user's override and TRL's SFT trainer do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.log_me = True
        return super().compute_loss(model, inputs, *args, **kwargs)


class Halves(Trainer):
    """Computes something else from the model's loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss / 2, outputs) if return_outputs else outputs.loss / 2


class Ignores(Trainer):
    """Has a loss of its own, as TRL's DPO trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.logsumexp(-1).mean()
        return (loss, outputs) if return_outputs else loss


class Adds(Trainer):
    """Has a loss of its own and adds the auxiliary one, as the documentation says."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.logits.logsumexp(-1).mean() + outputs.rank_expert_loss


class Twice(Trainer):
    """Calls the model twice and looks at one of the losses."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss + model(**inputs).logits.mean()


@pytest.mark.parametrize("config", [RankExpertConfig.smora, RankExpertConfig.more], ids=["token", "task"])
@pytest.mark.parametrize("own", [Trainer, Reads, Halves, Ignores, Adds, Twice], ids=lambda own: own.__name__)
def test_the_auxiliary_loss_is_added_exactly_once_whatever_computes_the_loss(own, config, tmp_path):
    options = {"tasks": TASKS, "r": 4} if config == RankExpertConfig.more else {"load_balance": "loss"}
    model = inject_rank_experts(models.llama(), config(target_modules=["q_proj", "v_proj"], **options))

    class Mixed(RankExpertTrainerMixin, own):
        pass

    data = TaskMixture({name: causal_examples(4) for name in TASKS})
    run = Mixed(model, arguments(tmp_path), train_dataset=data)
    inputs = next(iter(run.get_train_dataloader()))
    model.train()
    outputs = model(**inputs)
    task_loss = outputs.loss - outputs.rank_expert_loss
    free = outputs.logits.logsumexp(-1).mean()
    expected = {
        Halves: outputs.loss / 2,
        Ignores: free + outputs.rank_expert_loss,
        Adds: free + outputs.rank_expert_loss,
        Twice: task_loss + outputs.logits.mean() + 2 * outputs.rank_expert_loss,
    }.get(own, outputs.loss)
    total = run.compute_loss(model, dict(inputs))
    assert outputs.rank_expert_loss > 0
    torch.testing.assert_close(total, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    for got, want in zip(*(torch.autograd.grad(loss, trained) for loss in (total, expected)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("own", [Trainer, Ignores], ids=lambda own: own.__name__)
def test_mixed_precision_does_not_lose_the_auxiliary_loss(own, tmp_path):
    """accelerate converts the outputs, by their fields alone."""

    class Mixed(RankExpertTrainerMixin, own):
        pass

    def trained(coef):
        config = RankExpertConfig.smora(target_modules=["q_proj"], load_balance="loss", balance_coef=coef)
        model = inject_rank_experts(models.llama(), config)
        data = TaskMixture({"copy": causal_examples(8)})
        run = Mixed(model, arguments(tmp_path, bf16=True, max_steps=1, logging_steps=1), train_dataset=data)
        run.train()
        return run.state.log_history[0]

    with_loss, without = trained(1.0), trained(0.0)
    assert with_loss["auxiliary_loss"] > 0.5
    assert with_loss["loss"] == pytest.approx(without["loss"] + with_loss["auxiliary_loss"], abs=2e-2)


def test_a_trainer_leaves_nothing_on_the_model(tmp_path):
    model = inject_rank_experts(models.llama(), RankExpertConfig.smora(target_modules=["q_proj"], load_balance="loss"))
    data = TaskMixture({"copy": causal_examples(8)})
    hooks = list(model._forward_hooks.values())
    scope = routing_scopes(model)[0]
    first, second = (RankExpertTrainer(model, arguments(tmp_path), train_dataset=data) for _ in range(2))
    for run in (first, second, first):
        run.train()
        assert run.state.log_history[0]["auxiliary_loss"] > 0
        assert list(model._forward_hooks.values()) == hooks
        assert scope.listeners == []
        assert first._auxiliary == second._auxiliary == []


def test_a_loss_function_of_ones_own_is_told_of_the_auxiliary_loss(tmp_path):
    with pytest.warns(UserWarning, match=r"add\s+outputs.rank_expert_loss"):
        trainer(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum())


def test_learning_rate_groups(tmp_path):
    run = trainer(
        tmp_path, router_learning_rate=0.5, head_learning_rate=0.25, args=dict(weight_decay=0.1, learning_rate=0.125)
    )
    optimizer = run.create_optimizer()
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, p in run.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        is_expert = name.endswith((".A", ".B"))
        assert rate == (0.25 if name.startswith("heads") else 0.125 if is_expert else 0.5), name
        if name.endswith("task_embedding"):
            assert decay[name] == 0
        elif name.endswith(".A"):
            assert decay[name] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_sampling_reaches_the_loader(tmp_path):
    run = trainer(tmp_path, sampling="uniform", mixed_batches=False)
    batches = list(run.get_train_dataloader())
    assert len(batches) == 12
    assert all(len(set(batch["task_ids"].tolist())) == 1 for batch in batches)
    assert sum(int(batch["task_ids"][0]) for batch in batches) == 6
    plain = examples("first")
    with pytest.raises(ValueError, match="does not say which task"):
        RankExpertTrainer(classifier(), arguments(tmp_path), train_dataset=plain, sampling="uniform")
    lengthy = trainer(tmp_path, args=dict(train_sampling_strategy="group_by_length"))
    lengthy.get_train_dataloader()
    assert lengthy._sampler.lengths.tolist() == [6] * 48


def test_resuming_in_the_middle_of_an_epoch_is_exact(tmp_path):
    # 12 steps an epoch: 15 steps end in the second one, where the order differs from the first.
    settings = dict(max_steps=15, save_strategy="steps", save_steps=13, lr_scheduler_type="constant")
    whole = trainer(tmp_path / "a", args=settings)
    whole.train()
    resumed = trainer(tmp_path / "b", args=settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-13"))
    expected = state(whole.model)
    for name, value in state(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_checkpoints_hold_adapter_and_heads_alone(tmp_path):
    run = trainer(tmp_path, args=dict(max_steps=2, save_strategy="steps", save_steps=2))
    run.train()
    names = set(os.listdir(tmp_path / "checkpoint-2"))
    assert {"adapter_config.json", "adapter_model.safetensors", "heads.json", "heads.safetensors"} <= names
    assert "model.safetensors" not in names
    run.save_model(str(tmp_path / "saved"))
    assert set(os.listdir(tmp_path / "saved")) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "heads.json", "heads.safetensors")
    }
    # Whatever else is trained must not be lost.
    model = classifier()
    model.encoder.embeddings.word_embeddings.weight.requires_grad = True
    run = trainer(tmp_path / "more", model, args=dict(max_steps=2, save_strategy="steps", save_steps=2))
    run.train()
    assert "model.safetensors" in os.listdir(tmp_path / "more" / "checkpoint-2")


def test_the_first_process_of_every_node_saves_where_that_is_asked_for(tmp_path, monkeypatch):
    run = trainer(tmp_path, args=dict(save_on_each_node=True))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 8)
    assert run.args.should_save
    run._save(str(tmp_path / "node"))
    restored = trainer(tmp_path, args=dict(save_on_each_node=True))
    restored._restore(restored.model.encoder, str(tmp_path / "node"))
    for name, value in state(run.model).items():
        assert torch.equal(state(restored.model)[name], value), name


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    settings = dict(
        max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="mean", load_best_model_at_end=True,
    )  # fmt: skip
    run = trainer(tmp_path, args=settings)
    scores = iter([0.1, 0.9, 0.2, 0.3])
    states = []

    def score(task, prediction):
        if task == "first":
            states.append(state(run.model))
            score.value = next(scores)
        return {"accuracy": score.value, "f1": score.value}

    run._score = score
    run.train()
    assert run.state.best_global_step == 2
    for name, value in state(run.model).items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("order", ["adapter", "heads", "both"])
def test_a_checkpoint_of_tasks_in_another_order_is_not_resumed(order, tmp_path):
    trainer(tmp_path, args=dict(save_strategy="steps", save_steps=2, max_steps=2)).train()
    config = RankExpertConfig.more(
        tasks=TASKS[:: 1 if order == "heads" else -1], r=4, target_modules=["query", "value"]
    )
    encoder = inject_rank_experts(models.bert().bert, config)
    heads = {name: HeadSpec(labels=["low", "high"]) for name in TASKS[:: 1 if order == "adapter" else -1]}
    run = trainer(tmp_path / "b", MultiTaskClassifier(encoder, heads))
    before = state(run.model)
    with pytest.raises(ValueError, match=r"tasks.*\['first', 'last'\].*\['last', 'first'\]"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in state(run.model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("field", ["tasks", "alpha", "heads"])
def test_a_whole_models_checkpoint_of_another_adapter_is_not_resumed(field, tmp_path):
    """Where more than the adapter is trained the checkpoint has the model's tensors, which fit both."""
    changed = {"tasks": dict(tasks=TASKS[::-1]), "alpha": dict(alpha=3), "heads": dict(heads=TASKS[::-1])}[field]

    def run(folder, heads=TASKS, **changes):
        settings = dict(tasks=TASKS, r=4, target_modules=["query", "value"]) | changes
        encoder = inject_rank_experts(models.bert().bert, RankExpertConfig.more(**settings))
        encoder.embeddings.word_embeddings.weight.requires_grad = True
        heads = {name: HeadSpec(labels=["low", "high"]) for name in heads}
        saving = dict(save_strategy="steps", save_steps=2, max_steps=3)
        return trainer(folder, MultiTaskClassifier(encoder, heads), args=saving)

    run(tmp_path / "a").train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert "model.safetensors" in os.listdir(checkpoint)
    run(tmp_path / "b").train(resume_from_checkpoint=str(checkpoint))
    other = run(tmp_path / "a", **changed)
    before = state(other.model)
    for resume in (str(checkpoint), True):
        with pytest.raises(ValueError, match=rf"was saved with (the tasks' )?{field}"):
            other.train(resume_from_checkpoint=resume)
    for name, value in state(other.model).items():
        assert torch.equal(value, before[name]), name


def test_interrupt_leaves_a_checkpoint_that_resumes(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    settings = dict(max_steps=5, lr_scheduler_type="constant")
    run = trainer(tmp_path / "a", args=settings)
    before = signal.getsignal(signal.SIGINT)
    with SaveOnInterrupt() as interrupt:
        run.add_callback(Interrupt())
        run.add_callback(interrupt)
        run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert interrupt.interrupted
    assert run.state.global_step == 3
    resumed = trainer(tmp_path / "a", args=settings)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "b", args=settings)
    whole.train()
    expected = state(whole.model)
    for name, value in state(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_a_second_interrupt_ends_at_once():
    with SaveOnInterrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_data_without_tasks_trains_as_ever(tmp_path):
    smora = RankExpertConfig.smora(r=8, top_k=2, target_modules=["query", "value"])
    model = inject_rank_experts(models.bert(2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), smora)
    run = RankExpertTrainer(copy.deepcopy(model), arguments(tmp_path), train_dataset=examples("first"))
    plain = Trainer(model, arguments(tmp_path), train_dataset=examples("first"), callbacks=[RankExpertCallback()])
    run.train()
    plain.train()
    expected = state(plain.model)
    for name, value in state(run.model).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.slow
def endless(stop=None):
    for i in itertools.count():
        if i == stop:
            raise AssertionError("read beyond what training needs")
        yield causal_examples(24)[i % 24] | {"task_ids": i % 2}


@pytest.mark.parametrize("gate", ["task", "token"])
def test_a_stream_is_trained_on_without_being_read_whole(gate, tmp_path):
    config = (
        RankExpertConfig.more(tasks=TASKS, r=4, target_modules=["q_proj"])
        if gate == "task"
        else RankExpertConfig.smora(target_modules=["q_proj"])
    )
    model = inject_rank_experts(models.llama(), config)
    features = datasets.Features(
        {name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "attention_mask", "labels")}
        | {"task_ids": datasets.Value("int64")}
    )
    stream = datasets.IterableDataset.from_generator(endless, features=features, gen_kwargs={"stop": 200})
    assert "task_ids" in stream.column_names
    seen = []
    run = RankExpertTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=stream)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["task_ids"]), with_kwargs=True)
    run.train()
    assert torch.cat(seen).tolist() == [0, 1] * 6
    for options in ({"sampling": "uniform"}, {"mixed_batches": False}, {"epoch_size": 8}):
        with pytest.raises(ValueError, match="streaming train_dataset"):
            RankExpertTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=stream, **options)


def test_two_ranks_share_an_epoch_and_resume_in_the_second(tmp_path):
    script = Path(__file__).parents[1] / "distributed_training.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    path = os.pathsep.join([str(script.parent), *sys.path])
    subprocess.run([*command, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": path})
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for epoch in (slice(0, 6), slice(6, 10)):
        seen = [str(example) for rank in ranks for batch in rank["seen"][epoch] for example in batch]
        assert len(seen) == len(set(seen))
    assert len(ranks[0]["seen"]) == 10
    for rank in ranks:
        assert rank["resumed"] == rank["seen"][8:]
        assert rank["same"]
    assert ranks[0]["mean"] == ranks[1]["mean"]
