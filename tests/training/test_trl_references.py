"""TRL's trainers that go on from a trained adapter: their reference is a copy of it, balancing bias included."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainers import datasets, gate_config, losses, sentence, tokenizer

import models
from gates import GATES, randomise

trl = pytest.importorskip("trl")

ADAPTERS = [*GATES, "lora"]


def trained(adapter: str):
    """A model with an adapter whose every tensor has moved, as after a first training."""
    if adapter == "lora":
        made = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(models.llama(), made)
    model = get_peft_model(models.llama(), gate_config(adapter))
    randomise(model)
    return model


def arguments(cls, folder, **kwargs):
    common = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    return cls(str(folder), use_cpu=True, bf16=False, disable_tqdm=True, **(common | kwargs))


def first(run, key: str) -> float:
    return next(entry[key] for entry in run.state.log_history if key in entry)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dpo_starts_at_its_reference(adapter, tmp_path):
    rows = {
        "prompt": [sentence(i, 3) for i in range(8)],
        "chosen": [" " + sentence(i + 3, 3) for i in range(8)],
        "rejected": [" " + sentence(i + 20, 3) for i in range(8)],
    }
    run = trl.DPOTrainer(
        model=trained(adapter),
        args=arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=4, max_length=32),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    run.train()
    assert losses(run)[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(run)[1] < 0.693


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_first_kl_of_a_policy_gradient_is_zero(name, adapter, tmp_path):
    run = getattr(trl, f"{name}Trainer")(
        model=trained(adapter),
        reward_funcs=lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        args=arguments(
            getattr(trl, f"{name}Config"),
            tmp_path,
            beta=0.1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": [sentence(i, 3) for i in range(8)]}),
        processing_class=tokenizer(),
    )
    run.train()
    assert first(run, "kl") == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_first_kl_of_kto_is_zero(adapter, tmp_path):
    rows = {
        "prompt": [sentence(i, 3) for i in range(8)],
        "completion": [" " + sentence(i + 3, 3) for i in range(8)],
        "label": [i % 2 == 0 for i in range(8)],
    }
    run = trl.KTOTrainer(
        model=trained(adapter),
        args=arguments(trl.KTOConfig, tmp_path, per_device_train_batch_size=4, max_length=32),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    run.train()
    assert first(run, "kl") == pytest.approx(0.0, abs=1e-6)
    # Every log ratio is 0 at the start: half the examples' losses are 1 - σ(0).
    assert losses(run)[0] == pytest.approx(0.5, abs=1e-5)


def test_the_reference_stays_while_the_adapter_trains(tmp_path):
    rows = {"prompt": ["w3 w4"] * 8, "chosen": [" w5 w6"] * 8, "rejected": [" w9 w8"] * 8}
    model = trained("token")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".default" in name}
    run = trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=4, max_length=32),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    run.train()
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name.replace(".default", ".ref")], tensor), name
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())
