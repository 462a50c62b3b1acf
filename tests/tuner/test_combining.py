"""`add_weighted_adapter`: what PEFT computes for LoRA, for dense adapters and for one task of task gates."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import models
from gates import batch, config, logits, peft_model, randomise
from helpers import TASKS, assert_unchanged, fingerprint
from rank_experts import use_task
from rank_experts.layers import adapted_layers

WEIGHTS = [0.7, -0.4]


def two_loras():
    """LoRA and our dense adapters with the same tensors."""
    torch.manual_seed(0)
    lora = get_peft_model(models.llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    lora.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    ours = get_peft_model(models.llama(), config("dense", r=4, alpha=8, target_modules=["q_proj", "v_proj"]))
    ours.add_adapter("other", config("dense", r=4, alpha=4, target_modules=["q_proj", "down_proj"]))
    randomise(ours)
    randomise(ours, "other", seed=2)
    theirs = dict(lora.named_modules())
    with torch.no_grad():
        for path, layer in adapted_layers(ours):
            for name, adapter in layer.rank_experts.items():
                theirs[path].lora_A[name].weight.copy_(adapter.A)
                theirs[path].lora_B[name].weight.copy_(adapter.B)
    return ours, lora


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_dense_adapters_combine_as_loras_do(kind, tmp_path):
    ours, lora = two_loras()
    before = logits(ours, batch("dense"))
    for model in (ours, lora):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type=kind)
    assert torch.equal(logits(ours, batch("dense")), before)
    for model in (ours, lora):
        model.set_adapter("both")
    torch.testing.assert_close(logits(ours, batch("dense")), logits(lora, batch("dense")), rtol=1e-4, atol=1e-5)
    assert (logits(ours, batch("dense")) - before).abs().max() > 1e-2
    ours.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(models.llama(), tmp_path / "both")
    assert torch.equal(logits(loaded, batch("dense")), logits(ours, batch("dense")))


def test_cat_is_exact_for_a_task():
    model = peft_model("task", target_modules=["q_proj"])
    model.add_adapter("other", config("dense", target_modules=["q_proj", "up_proj"]))
    randomise(model)
    randomise(model, "other", seed=2)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type="cat", task="mnli")
    for _, layer in adapted_layers(model):
        expected = 0.0
        for name, weight in zip(("default", "other"), WEIGHTS):
            if name in layer.rank_experts:
                expected = expected + weight * layer.rank_experts[name].delta(TASKS.index("mnli"))
        torch.testing.assert_close(layer.rank_experts["both"].delta(), expected)
    model.set_adapter("both")
    with use_task(model, "rte"):
        logits(model, models.batch("llama"))  # a dense adapter: any task will do


def refused(model, match, *args, **kwargs):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(*args, **kwargs)
    assert_unchanged(model, before)


def test_what_is_not_supported_is_refused_by_name():
    dense = peft_model("dense")
    dense.add_adapter("wide", config("dense", r=8))
    pair = ["default", "wide"]
    refused(dense, "combination_type='svd' is not supported.*'linear' and 'cat' are", pair, WEIGHTS, "new")
    refused(dense, "'ties' is not supported", pair, WEIGHTS, "new", combination_type="ties")
    refused(dense, r"\[4, 8\] ranks", pair, WEIGHTS, "new", combination_type="linear")
    refused(dense, "no adapter 'wid'.*nearest is 'wide'", ["wid"], [1.0], "new", combination_type="cat")
    refused(dense, "2 adapters and 1 weights", pair, [1.0], "new", combination_type="cat")
    refused(dense, "has an adapter 'wide' already", pair, WEIGHTS, "wide", combination_type="cat")
    refused(dense, "cannot be called 'v1.0'", pair, WEIGHTS, "v1.0", combination_type="cat")
    token = peft_model("token")
    refused(token, "routes by token, and is not supported", ["default"], [1.0], "new", combination_type="cat")
    task = peft_model("task")
    refused(task, "routes by task.*found task=None", ["default"], [1.0], "new", combination_type="cat")
    refused(task, "found task='wnli'", ["default"], [1.0], "new", combination_type="cat", task="wnli")
    head = get_peft_model(models.bert(), config("dense", target_modules=["query"], modules_to_save=["classifier"]))
    head.add_adapter("more", config("dense", target_modules=["query"], modules_to_save=["classifier"]))
    refused(head, "classifier: several of the adapters", ["default", "more"], WEIGHTS, "new", combination_type="cat")
