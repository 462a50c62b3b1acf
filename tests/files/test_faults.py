"""What goes wrong in training: NaN, nothing at all, experts that die, and processes that are killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from helpers import dense_config, task_config, token_config
from models import batch, llama, vit
from rank_experts import inject_rank_experts, update_router_bias, use_task
from rank_experts.layers import adapted_layers
from rank_experts.routing import contrastive_loss
from rank_experts.training.balance import count_idle, dead_experts, take_nan_examples
from rank_experts.training.callbacks import RankExpertCallback

SMALL = dict(target_modules=["q_proj", "v_proj"])


def biases(model):
    return [layer.rank_experts["default"].balance_bias.clone() for _, layer in adapted_layers(model)]


def loads(model):
    return [layer.scope.loads[layer.path, "default"].clone() for _, layer in adapted_layers(model)]


def text(size=3, length=5):
    ids = torch.randint(1, 64, (size, length), generator=torch.Generator().manual_seed(2))
    return {"inputs_embeds": llama().get_input_embeddings()(ids).detach(), "labels": ids}


def only(inputs, rows):
    return {name: value[rows] for name, value in inputs.items()}


def poisoned(inputs, row=1):
    inputs = dict(inputs)
    inputs["inputs_embeds"] = inputs["inputs_embeds"].clone()
    inputs["inputs_embeds"][row, 2] = float("nan")
    return inputs


# NaN


def test_tokens_with_a_nan_do_not_move_the_bias():
    clean, dirty = (inject_rank_experts(llama(), token_config(**SMALL)).train() for _ in range(2))
    inputs = text()
    clean(**only(inputs, [0, 2]))
    dirty(**poisoned(inputs))
    for number, (before, after) in enumerate(zip(loads(clean), loads(dirty), strict=True)):
        extra = after - before
        assert extra.min() >= 0
        # The first block sees four good tokens beside the NaN; its attention spreads it over the whole example.
        assert extra.sum() == (4 * 4 if number < 2 else 0)
    update_router_bias(dirty)
    assert all(bias.isfinite().all() for bias in biases(dirty))


def test_a_batch_of_nan_leaves_the_bias_alone():
    model = inject_rank_experts(llama(), token_config(**SMALL)).train()
    before = biases(model)
    model(inputs_embeds=torch.full((2, 4, 32), float("nan")))
    assert all(load.sum() == 0 for load in loads(model))
    update_router_bias(model)
    assert all(torch.equal(first, second) for first, second in zip(before, biases(model), strict=True))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (torch.tensor([0, 2, 1]), {"rte": 1}),
        (["cola", "mnli", "rte"], {"mnli": 1}),
        ("cola", {"cola": 1}),
    ],
)
def test_a_nan_is_reported_with_its_task(tasks, expected):
    model = inject_rank_experts(llama(), task_config(**SMALL)).train()
    model(**text(), task_ids=tasks)
    assert take_nan_examples(model) == {}
    model(**poisoned(text()), task_ids=tasks)
    model(**text(), task_ids=tasks)
    assert take_nan_examples(model) == expected
    assert take_nan_examples(model) == {}


def test_a_nan_is_reported_without_names_where_there_are_none():
    model = inject_rank_experts(llama(), token_config(**SMALL)).train()
    model(**poisoned(text()))
    model(**poisoned(text()), task_ids=torch.tensor([4, 5, 6]))
    assert take_nan_examples(model) == {"unknown task": 1, "task 5": 1}
    single = inject_rank_experts(llama(), task_config(tasks=["only"], **SMALL)).train()
    single(**poisoned(text(), row=0))
    assert take_nan_examples(single) == {"only": 1}


class Plain(torch.nn.Module):
    """Linear layers without attention, which takes batches without rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 3)

    def forward(self, inputs_embeds, attention_mask=None, labels=None):
        logits = self.down(torch.relu(self.up(inputs_embeds)))
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return CausalLMOutput(loss=losses.sum() / 20, logits=logits)


def test_a_nan_in_the_padding_is_no_nan():
    model = inject_rank_experts(Plain(), token_config(r=8)).train()
    inputs = {"inputs_embeds": torch.randn(3, 5, 8), "labels": torch.zeros(3, 5, dtype=torch.long)}
    inputs["inputs_embeds"][1, 2] = float("nan")
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 2:] = 0
    model(**inputs, attention_mask=mask)
    assert take_nan_examples(model) == {}
    model(**inputs)
    assert take_nan_examples(model) == {"unknown task": 1}


def test_a_nan_in_a_classifier_is_reported():
    model = inject_rank_experts(vit(), task_config(target_modules="all-linear")).train()
    inputs = batch("vit")
    inputs["pixel_values"][3, 0, 0, 0] = float("nan")
    model(**inputs, task_ids=torch.tensor([0, 1, 2, 1]))
    assert take_nan_examples(model) == {"mnli": 1}


def test_inference_keeps_no_record():
    model = inject_rank_experts(llama(), token_config(**SMALL)).eval()
    model(**poisoned(text()))
    assert take_nan_examples(model) == {}


class Rows(torch.utils.data.Dataset):
    def __init__(self, size=24, poison=None):
        torch.manual_seed(5)
        self.pixels, self.labels, self.poison = torch.randn(size, 3, 16, 16), torch.randint(0, 3, (size,)), poison

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        pixels = self.pixels[index].clone()
        if index == self.poison:
            pixels[0, 0, 0] = float("nan")
        return {"pixel_values": pixels, "labels": self.labels[index], "task_ids": index % 3}


def train(folder, config, dataset=None, callback=None, **kwargs):
    model = inject_rank_experts(vit(), config)
    defaults = dict(max_steps=6, per_device_train_batch_size=4, report_to=[], save_strategy="no", disable_tqdm=True)
    args = TrainingArguments(str(folder), use_cpu=True, logging_steps=1, **(defaults | kwargs))
    trainer = Trainer(model, args, train_dataset=dataset or Rows(), callbacks=[callback or RankExpertCallback()])
    trainer.train()
    return model


def test_the_callback_names_the_step_and_the_task_of_a_nan(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rank_experts"):
        train(tmp_path, task_config(), Rows(poison=4), learning_rate=0.0)
    messages = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert len(messages) == 1
    assert "1 example(s) of mnli" in messages[0]


# Nothing at all


CONFIGS = {
    "bias": lambda **kw: token_config(load_balance="bias", **kw),
    "loss": lambda **kw: token_config(load_balance="loss", **kw),
    "mean": lambda **kw: task_config(pooling="mean", task_embedding_dim=8, **kw),
    "first": lambda **kw: task_config(pooling="first", **kw),
    "last": lambda **kw: task_config(pooling="last", **kw),
    "dense": dense_config,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_micro_batch_of_padding_changes_nothing(kind):
    inputs = batch("llama")
    nothing = {"input_ids": inputs["input_ids"], "attention_mask": torch.zeros_like(inputs["attention_mask"])}
    nothing["labels"] = torch.full_like(inputs["labels"], -100)
    # As Trainer counts: labels of the whole step.
    items = {"num_items_in_batch": 2 * (inputs["labels"][:, 1:] != -100).sum()}
    check_empty(llama, CONFIGS[kind](**SMALL), inputs | items, nothing | items)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_micro_batch_without_rows_changes_nothing(kind):
    inputs = {"inputs_embeds": torch.randn(4, 5, 8), "labels": torch.zeros(4, 5, dtype=torch.long)}
    check_empty(Plain, CONFIGS[kind](), inputs, only(inputs, []))


def check_empty(make, config, inputs, nothing):
    """An accumulation of two micro-batches, with and without an empty one between them."""
    results = []
    for with_empty in (False, True):
        model = inject_rank_experts(make(), config).train()
        ids = torch.tensor([0, 1, 2, 0])
        routed = config.router == "task"
        tasks = {"task_ids": ids} if routed else {}
        no_tasks = {"task_ids": ids[: len(nothing["labels"])]} if routed else {}
        model(**inputs, **tasks).loss.backward()
        if with_empty:
            out = model(**nothing, **no_tasks)
            assert out.loss == 0
            out.loss.backward()
        model(**inputs, **tasks).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        update_router_bias(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        results.append((gradients, state))
    (gradients, state), (with_gradients, with_state) = results
    assert gradients
    assert gradients.keys() == with_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, with_gradients[name]), name
    for name, tensor in state.items():
        assert torch.equal(tensor, with_state[name]), name


def test_a_padded_example_does_not_dilute_the_contrastive_loss():
    torch.manual_seed(0)
    examples, embedding = torch.randn(3, 8), torch.randn(2, 8)
    expected = contrastive_loss(examples[:2], embedding, torch.tensor([0, 1]), 0.05)
    mask = torch.tensor([True, True, False])
    examples[2] = float("nan")
    assert torch.equal(contrastive_loss(examples, embedding, torch.tensor([0, 1, 0]), 0.05, mask), expected)
    assert contrastive_loss(examples, embedding, torch.tensor([0, 1, 0]), 0.05, ~mask & False) == 0


def test_an_example_of_padding_does_not_change_the_others_loss():
    inputs = batch("llama") | {"task_ids": torch.tensor([0, 1, 2, 0])}
    padded = dict(inputs)
    padded["attention_mask"] = inputs["attention_mask"].clone()
    padded["attention_mask"][3] = 0
    model = inject_rank_experts(llama(), task_config(**SMALL)).train()
    loss = model(**padded).rank_expert_loss
    three = {name: value[:3] for name, value in inputs.items()}
    torch.testing.assert_close(loss, model(**three).rank_expert_loss)


def test_tasks_of_no_rows_are_none():
    model = inject_rank_experts(Plain(), task_config()).eval()
    inputs = {"inputs_embeds": torch.zeros(0, 5, 8), "labels": torch.zeros(0, 5, dtype=torch.long)}
    assert model(**inputs, task_ids=torch.zeros(0, dtype=torch.long)).logits.shape == (0, 5, 3)
    with use_task(model, "rte"):
        assert model(**inputs).logits.shape == (0, 5, 3)


# Experts that die


def test_idle_updates_are_counted_in_a_row():
    key = ("q", "default")
    idle = {}
    for load in ([4.0, 0.0, 0.0], [0.0, 0.0, 4.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0]):
        idle = count_idle(idle, {key: torch.tensor(load)})
    assert idle[key].tolist() == [0, 3, 1]
    assert dead_experts(idle, 3) == {key: [1]}
    assert dead_experts(idle, 4) == {}
    assert count_idle(idle, {})[key].tolist() == [0, 3, 1]


def test_the_callback_names_dead_experts(tmp_path, caplog):
    class Kill(RankExpertCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            router = next(adapted_layers(model))[1].rank_experts["default"]
            router.balance_bias[3] = -10.0

    with caplog.at_level(logging.WARNING, logger="rank_experts"):
        train(tmp_path, token_config(r=8, top_k=7), callback=Kill(dead_after=5))
    messages = [record.getMessage() for record in caplog.records if "no token chose" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("step 5: no token chose experts [3] of vit.")
    assert "in 5 updates" in messages[0]


def test_experts_that_live_are_not_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rank_experts"):
        train(tmp_path, token_config(r=8, top_k=7), callback=RankExpertCallback(dead_after=2))
    assert not [record for record in caplog.records if "no token chose" in record.getMessage()]


# Kill -9, and resume

TRAINING = """
import sys, time
from test_faults import *
from rank_experts.files.saving import save_rank_experts
from rank_experts.training.trainer import RankExpertTrainer
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

kind, folder, slow = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "slow"
torch.set_num_threads(1)
set_seed(0)

class Slow(RankExpertCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.3 if slow else 0)

config = {"token": token_config, "task": task_config}[kind](dropout=0.2)
model = inject_rank_experts(vit(), config)
args = TrainingArguments(str(folder), use_cpu=True, max_steps=10, per_device_train_batch_size=4, report_to=[],
                         save_steps=2, disable_tqdm=True, learning_rate=1e-2, logging_steps=1)
trainer = RankExpertTrainer(model, args, train_dataset=Rows(), callbacks=[Slow()])
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
save_rank_experts(model, folder / "final")
"""


def child(*args):
    paths = [str(Path(__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TRAINING, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["token", "task"])
def test_a_killed_training_resumes_to_the_same_adapter(tmp_path, kind):
    whole = child(kind, tmp_path / "whole", "fast")
    killed = child(kind, tmp_path / "killed", "slow")
    for line in killed.stdout:
        if line.strip() == "step 5":
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()
    assert (tmp_path / "killed" / "checkpoint-4").exists()
    resumed = child(kind, tmp_path / "killed", "fast")
    for process in (whole, resumed):
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
    # Libraries that are installed beside it may print lines of their own.
    assert next(line for line in out.splitlines() if line.startswith("step ")) == "step 5"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / run / "final" / name for run in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), name
