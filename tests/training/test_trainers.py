"""transformers' Trainer, TRL's trainers and a bare accelerate loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import models
import rank_experts.messages
from gates import GATES, config, peft_model
from rank_experts import inject_rank_experts, load_rank_experts, save_rank_experts, update_router_bias, use_task
from rank_experts.layers import adapted_layers
from rank_experts.training.callbacks import RankExpertCallback
from rank_experts.training.trainer import RankExpertTrainerMixin

datasets = pytest.importorskip("datasets")

EVERY = pytest.mark.parametrize("gate", GATES)


def text(gate: str, size: int = 48, **columns) -> datasets.Dataset:
    """Sequences that count upwards, whose labels a causal model can learn; a column that no model takes."""
    ids = (torch.arange(6) + torch.arange(size)[:, None]) % (models.VOCAB - 1) + 1
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": ids.tolist()}
    if gate == "task":
        rows["task_ids"] = [i % 3 for i in range(size)]
    return datasets.Dataset.from_dict(rows | {"source": ["x"] * size} | columns).with_format("torch")


def arguments(folder, **kwargs) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(defaults | kwargs))


def trainer(model, folder, gate, cls=Trainer, callbacks=(), **kwargs):
    return cls(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=text(gate),
        eval_dataset=text(gate, size=12),
        callbacks=[RankExpertCallback(), *callbacks],
    )


def make(gate: str, way: str, **kwargs):
    """A model with dropout and an adapter, put in by one of the two ways."""
    kwargs = {"dropout": 0.1, "init_weights": True} | kwargs
    if gate == "token":
        kwargs = {"r": 8, "balance_rate": 0.05} | kwargs
    torch.manual_seed(0)
    base, made = models.llama(), config(gate, **kwargs)
    if way == "peft":
        return get_peft_model(base, made)
    return inject_rank_experts(base, made)


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".rank_experts." in name}


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **kwargs) -> None:
    assert one.keys() == other.keys()
    assert one
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **({"rtol": 0, "atol": 0} | kwargs), msg=lambda text, name=name: f"{name}: {text}"
        )


@EVERY
def test_training_lowers_the_loss_and_changes_the_adapter_alone(gate, tmp_path):
    model = make(gate, "peft")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = trainer(model, tmp_path, gate)
    run.train()
    first, last = sum(losses(run)[:4]), sum(losses(run)[-4:])
    assert last < first - 0.2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (".rank_experts." in name), name


@EVERY
def test_columns(gate, tmp_path):
    """`task_ids` stays when unused columns are removed; what no model takes goes."""
    run = trainer(make(gate, "peft"), tmp_path, gate)
    batch = next(iter(run.get_train_dataloader()))
    expected = {"input_ids", "attention_mask", "labels"} | ({"task_ids"} if gate == "task" else set())
    assert set(batch) == expected


@EVERY
@pytest.mark.parametrize("way", ["peft", "injected"])
def test_twenty_steps_equal_ten_and_ten_more(gate, way, tmp_path):
    whole = trainer(make(gate, way), tmp_path / "whole", gate, lr_scheduler_type="cosine")
    whole.train()

    class StopAtTen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 10

    saving = {"save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "cosine"}
    first = trainer(make(gate, way), tmp_path / "parts", gate, callbacks=[StopAtTen()], **saving)
    first.train()
    assert first.state.global_step == 10
    set_seed(12345)
    second = trainer(make(gate, way), tmp_path / "parts", gate, **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 20
    assert losses(second)[10:] == losses(whole)[10:]
    assert_same(adapter(second.model), adapter(whole.model))
    if gate == "token":
        assert any(b.abs().sum() > 0 for name, b in second.model.named_buffers() if "balance_bias" in name)


@EVERY
def test_load_best_model_at_end(gate, tmp_path):
    """The learning rate explodes after the first evaluation, so that an early checkpoint is the best."""

    class Explode(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step > 10:
                for group in optimizer.param_groups:
                    group["lr"] = 10.0

    run = trainer(
        make(gate, "peft"),
        tmp_path,
        gate,
        callbacks=[Explode()],
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-10")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)
    best = get_peft_model(models.llama(), config(gate, r=8 if gate == "token" else 4))
    best.load_adapter(run.state.best_model_checkpoint, "best")
    expected = {name.replace(".best", ""): t for name, t in adapter(best).items() if ".best" in name}
    assert_same({name.replace(".default", ""): t for name, t in adapter(run.model).items()}, expected)


@EVERY
def test_evaluation_and_prediction(gate, tmp_path):
    model = make(gate, "peft", init_weights=False)
    run = trainer(model, tmp_path, gate, per_device_eval_batch_size=5)
    predicted = run.predict(run.eval_dataset)
    inputs = {name: run.eval_dataset[:][name] for name in ("input_ids", "attention_mask", "labels")}
    ids = {"task_ids": run.eval_dataset[:]["task_ids"]} if gate == "task" else {}
    with torch.no_grad():
        expected = model(**inputs, **ids)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected.logits, rtol=1e-4, atol=1e-5)
    assert predicted.metrics["test_loss"] == pytest.approx(float(expected.loss), rel=1e-3)


@EVERY
def test_the_saved_model_loads_anywhere(gate, tmp_path):
    run = trainer(make(gate, "peft"), tmp_path, gate, max_steps=3)
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded = load_rank_experts(models.llama(), tmp_path / "final")
    inputs = {name: column for name, column in text(gate, 4)[:].items() if name != "source"}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, run.model.eval()(**inputs).logits)


def test_the_balancing_bias_moves_once_a_step_whatever_the_accumulation(tmp_path):
    """Four micro-batches of one and one batch of four see the same load."""
    results = {}
    for size, accumulation in ((4, 1), (1, 4)):
        model = make("token", "peft", dropout=0.0, init_weights=False)
        run = trainer(
            model,
            tmp_path,
            "token",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=5,
        )
        run.train()
        results[size] = {name: b.clone() for name, b in model.named_buffers() if "balance_bias" in name}
    assert_same(results[1], results[4])
    rounded = torch.stack(list(results[4].values())) / 0.05
    assert rounded.abs().max() <= 5.001
    torch.testing.assert_close(rounded, rounded.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("gate", ["token", "task"])
def test_gradient_accumulation_counts_the_auxiliary_loss_once(gate, tmp_path):
    results = {}
    for size, accumulation in ((4, 1), (2, 2)):
        kwargs = {"load_balance": "loss", "balance_coef": 1.0} if gate == "token" else {"contrastive_coef": 1.0}
        model = make(gate, "peft", dropout=0.0, init_weights=False, **kwargs)
        run = trainer(
            model,
            tmp_path,
            gate,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
        )
        run.train()
        results[size] = losses(run)[0]
    # The contrastive loss is a mean over examples; the balancing loss is not quite linear in its batch.
    assert results[2] == pytest.approx(results[4], rel=1e-4 if gate == "task" else 0.05)


@pytest.mark.parametrize("gate", ["token", "task"])
def test_label_smoothing_bypasses_the_auxiliary_loss_and_says_so(gate, tmp_path):
    rank_experts.messages.warn_once.cache_clear()
    kwargs = {"load_balance": "loss"} if gate == "token" else {}
    run = trainer(
        make(gate, "peft", **kwargs), tmp_path, gate, label_smoothing_factor=0.1, max_steps=25, logging_steps=25
    )
    with pytest.warns(UserWarning, match=r"auxiliary losses took part in no backward pass.*outputs\.rank_expert_loss"):
        run.train()
    assert losses(run)[0] > 0


@EVERY
def test_nothing_is_said_where_the_auxiliary_loss_is_used(gate, tmp_path):
    rank_experts.messages.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*auxiliary")
        trainer(make(gate, "peft"), tmp_path, gate, max_steps=25, logging_steps=25).train()


@EVERY
def test_gradient_checkpointing_in_a_trainer(gate, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = make(gate, "peft")
        trainer(model, tmp_path, gate, max_steps=4, gradient_checkpointing=checkpointing).train()
        results.append(adapter(model))
    assert_same(*results, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_bare_accelerate_loop(gate, tmp_path):
    from accelerate import Accelerator

    def run(steps, folder=None, resume=False):
        model = make(gate, "peft")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        columns = [name for name in text(gate).column_names if name != "source"]
        # A generator of its own: the loader would draw a seed from the one that dropout uses, once a start.
        rows, generator = text(gate).select_columns(columns), torch.Generator()
        loader = torch.utils.data.DataLoader(rows, batch_size=2, generator=generator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if resume:
            accelerator.load_state(str(folder))
            loader = accelerator.skip_first_batches(loader, 2 * steps)
        model.train()
        done = 0
        for inputs in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**inputs).loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    update_router_bias(model)
                    done += 1
                optimizer.zero_grad()
            if accelerator.sync_gradients and done == steps:
                break
        if folder is not None and not resume:
            accelerator.save_state(str(folder))
        return accelerator.unwrap_model(model)

    set_seed(1)
    whole = adapter(run(8))
    set_seed(1)
    run(4, tmp_path / "state")
    set_seed(99)
    assert_same(adapter(run(4, tmp_path / "state", resume=True)), whole)


# TRL


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, models.VOCAB)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def sentence(start: int, length: int = 6) -> str:
    return " ".join(f"w{3 + (start + i) % (models.VOCAB - 3)}" for i in range(length))


def trl_arguments(cls, folder, **kwargs):
    common = arguments(folder, **kwargs).to_dict()
    wanted = ("per_device_train_batch_size", "max_steps", "learning_rate", "logging_steps", "save_strategy")
    return cls(
        str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=32,
        **{name: common[name] for name in wanted},
    )


def gate_config(gate):
    """One task, which need not be named, where TRL has no way to pass a task."""
    return config(gate, init_weights=True, task_type="CAUSAL_LM", **({"tasks": ["only"]} if gate == "task" else {}))


@EVERY
def test_sft_trainer(gate, tmp_path):
    trl = pytest.importorskip("trl")
    run = trl.SFTTrainer(
        model=models.llama(),
        args=trl_arguments(trl.SFTConfig, tmp_path, max_steps=12),
        train_dataset=datasets.Dataset.from_dict({"text": [sentence(i) for i in range(48)]}),
        processing_class=tokenizer(),
        peft_config=gate_config(gate),
        callbacks=[RankExpertCallback()],
    )
    assert len(list(adapted_layers(run.model))) == 14
    run.train()
    assert sum(losses(run)[-3:]) < sum(losses(run)[:3])
    run.save_model(str(tmp_path / "final"))
    assert load_rank_experts(models.llama(), tmp_path / "final")


class Rows:
    """A collator that stacks the columns which the model takes, `task_ids` among them."""

    def __call__(self, rows):
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0] if name != "source"}


def sft_with_columns(gate, folder, steps, **kwargs):
    trl = pytest.importorskip("trl")
    args = trl_arguments(trl.SFTConfig, folder, max_steps=steps)
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    rows = text(gate)
    padded = [[1, 1, 1, 1, 0, 0]] * len(rows)
    rows = rows.remove_columns("attention_mask").add_column("attention_mask", padded)
    run = trl.SFTTrainer(
        model=models.llama(),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=config(gate, init_weights=True, task_type="CAUSAL_LM", **kwargs),
        data_collator=Rows(),
    )
    run.train()
    return run


@pytest.mark.parametrize("gate", ["token", "task"])
def test_sft_trainer_computes_a_loss_of_its_own_and_the_user_is_told(gate, tmp_path):
    """TRL puts a forward of its own in the place of the model's, and adds up log-probabilities itself."""
    rank_experts.messages.warn_once.cache_clear()
    seen = []

    def add(module, args, outputs):
        seen.append(outputs.rank_expert_loss)

    with pytest.warns(UserWarning, match=r"no backward pass.*outputs\.rank_expert_loss"):
        run = sft_with_columns(gate, tmp_path, 25, **({"load_balance": "loss"} if gate == "token" else {}))
    model = run.model.get_base_model()
    model.register_forward_hook(add)
    model.train()
    model(**Rows()([run.train_dataset[i] for i in range(4)]), fused_lm_head=True)
    assert seen[0] > 0
    assert seen[0].requires_grad
    merged = run.model.unload()
    assert not merged._forward_pre_hooks
    assert not [hook for hook in merged._forward_hooks.values() if hook is not add]


def test_sft_trainer_counts_the_load_without_padding(tmp_path):
    run = sft_with_columns("token", tmp_path, 3)
    for _, layer in adapted_layers(run.model):
        assert (
            layer.scope.loads[layer.path, "default"].sum() == 3 * 4 * 4 * 2
        )  # steps, examples, tokens, experts a token


@EVERY
def test_dpo_trainer(gate, tmp_path):
    trl = pytest.importorskip("trl")
    rows = {
        "prompt": [sentence(i, 3) for i in range(24)],
        "chosen": [" " + sentence(i + 3, 3) for i in range(24)],
        "rejected": [" " + sentence(i + 20, 3) for i in range(24)],
    }
    run = trl.DPOTrainer(
        model=models.llama(),
        args=trl_arguments(trl.DPOConfig, tmp_path, max_steps=6),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=gate_config(gate),
        callbacks=[RankExpertCallback()],
    )
    before = adapter(run.model)
    run.train()
    # B starts at zero, so the policy starts at its reference, the same model with the adapter off.
    assert losses(run)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(run)[-1] < losses(run)[0]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in adapter(run.model).items())


def test_dpo_trainer_computes_a_loss_of_its_own_and_the_user_is_told(tmp_path):
    trl = pytest.importorskip("trl")
    rank_experts.messages.warn_once.cache_clear()
    rows = {"prompt": ["w3 w4"] * 8, "chosen": [" w5 w6"] * 8, "rejected": [" w9 w8"] * 8}
    run = trl.DPOTrainer(
        model=models.llama(),
        args=trl_arguments(trl.DPOConfig, tmp_path, max_steps=25),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=config("token", load_balance="loss", task_type="CAUSAL_LM"),
    )
    with pytest.warns(UserWarning, match="auxiliary losses took part in no backward pass"):
        run.train()


def test_dpo_trainer_for_one_of_several_tasks(tmp_path):
    """`use_task` around `train` names the task for every call."""
    trl = pytest.importorskip("trl")
    rows = {"prompt": ["w3 w4"] * 8, "chosen": [" w5 w6"] * 8, "rejected": [" w9 w8"] * 8}
    model = peft_model("task", task_type="CAUSAL_LM", init_weights=True)
    run = trl.DPOTrainer(
        model=model,
        args=trl_arguments(trl.DPOConfig, tmp_path, max_steps=2),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    with use_task(model, "rte"):
        run.train()
    assert losses(run)[-1] < 0.6931
    save_rank_experts(model, tmp_path / "final")


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_the_mixin_adds_the_auxiliary_loss_to_trls(name, tmp_path):
    trl = pytest.importorskip("trl")
    plain = getattr(trl, f"{name}Trainer")

    class Mixed(RankExpertTrainerMixin, plain):
        pass

    text = {"text": [sentence(i) for i in range(8)]}
    pairs = {"prompt": ["w3 w4"] * 8, "chosen": [" w5 w6"] * 8, "rejected": [" w9 w8"] * 8}
    run = Mixed(
        model=models.llama(),
        args=trl_arguments(getattr(trl, f"{name}Config"), tmp_path, max_steps=1),
        train_dataset=datasets.Dataset.from_dict(text if name == "SFT" else pairs),
        processing_class=tokenizer(),
        peft_config=config("token", load_balance="loss", task_type="CAUSAL_LM"),
    )
    seen = []
    run.model.get_base_model().register_forward_hook(lambda *args: seen.append(args[2]))
    inputs = next(iter(run.get_train_dataloader()))
    run.model.train()
    total = run.compute_loss(run.model, dict(inputs))
    auxiliary = [outputs.rank_expert_loss for outputs in seen if hasattr(outputs, "rank_expert_loss")]
    auxiliary = [loss for loss in auxiliary if loss.requires_grad]
    assert len(auxiliary) == 1  # DPO's reference has none
    # What TRL computes without any auxiliary loss, whether it looks at the model's own loss or not.
    for _, layer in adapted_layers(run.model):
        layer.rank_experts["default"].settings = layer.rank_experts["default"].settings._replace(balance_coef=0.0)
    torch.testing.assert_close(total, plain.compute_loss(run, run.model, dict(inputs)) + auxiliary[0])
    assert auxiliary[0] > 0
