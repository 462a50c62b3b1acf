"""Reading an adapter's folder without a model: what comes back, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import CONFIGS, TASKS, needs_trained_biases, task_config, token_config
from models import llama
from rank_experts import inject_rank_experts, save_rank_experts
from rank_experts.files.reading import holds_rank_experts, read_adapter_files

LAYER = "model.layers.1.mlp.down_proj"  # (32, 48)
NAMES = {
    "dense": {"A", "B"},
    "token": {"A", "B", "router_weight", "balance_bias"},
    "blocks": {"A", "B", "router_weight", "balance_bias"},
    "task": {"A", "B", "task_embedding", "gate_weight", "gate_bias", "projection"},
}
ONE = {"target_modules": ["down_proj"]}


def saved(folder, config):
    save_rank_experts(inject_rank_experts(llama(), config), folder)
    return folder


def key(tensors, name):
    return next(key for key in tensors if LAYER in key and re.search(rf"[._]{name}$", key))


def edited(folder, change):
    """Change a saved adapter's tensors, without the digest that would tell."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_comes_back_by_layer(kind, tmp_path):
    model = inject_rank_experts(llama(), CONFIGS[kind](**({"task_embedding_dim": 8} if kind == "task" else {})))
    save_rank_experts(model, tmp_path)
    files = read_adapter_files(tmp_path)
    assert (files.folder, files.config.router) == (tmp_path, model.peft_config["default"].router)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(files.layers) == 14
    assert set(files.layers[LAYER]) == NAMES[kind]
    assert sum(len(own) for own in files.layers.values()) == len(tensors)
    assert torch.equal(files.layers[LAYER]["A"], tensors[key(tensors, "A")])
    assert files.others == {}


def test_patterns_say_a_layers_rank_and_alpha(tmp_path):
    patterns = {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    files = read_adapter_files(saved(tmp_path, token_config(**patterns)))
    assert len(files.layers[LAYER]["A"]) == 8
    assert [files.alpha(LAYER), files.alpha(LAYER.replace("1", "0"))] == [3, 8]


@needs_trained_biases
def test_what_is_no_adapters_tensor_is_told_apart(tmp_path):
    folder = saved(tmp_path, token_config(modules_to_save=["embed_tokens"], **ONE))
    files = read_adapter_files(folder)
    assert list(files.others) == ["base_model.model.model.embed_tokens.weight"]
    edited(folder, lambda tensors: tensors["base_model.model.model.embed_tokens.weight"].fill_(torch.inf))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has values that are not finite"):
        read_adapter_files(folder)


def test_whose_a_folder_is(tmp_path):
    assert holds_rank_experts(saved(tmp_path / "ours", token_config(**ONE)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert not holds_rank_experts(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(ValueError, match="is not JSON"):
        holds_rank_experts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        holds_rank_experts(tmp_path.parent)


CHANGES = {
    "a tensor is missing": (lambda t: t.pop(key(t, "B")), r"lacks B of model\.layers\.1\.mlp\.down_proj"),
    "a row of A is missing": (
        lambda t: t.update({key(t, "A"): torch.zeros(15, 48)}),
        r"A has shape \(15, 48\), expected",
    ),
    "A is a vector": (lambda t: t.update({key(t, "A"): torch.zeros(48)}), r"A has shape \(48,\), expected \(16, 48\)"),
    "B is a number": (lambda t: t.update({key(t, "B"): torch.tensor(1.0)}), r"B has shape \(\), expected"),
    "not finite": (lambda t: t[key(t, "B")].fill_(torch.nan), "B has values that are not finite"),
    "integers": (lambda t: t.update({key(t, "A"): torch.zeros(16, 48, dtype=torch.int32)}), "A is torch.int32"),
    "a bias of 16 bits": (
        lambda t: t.update({key(t, "balance_bias"): torch.zeros(16).half()}),
        "balance_bias is torch.fl",
    ),
    "nothing is left": (lambda t: t.clear(), "holds no adapted layer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_bad_tensors_are_refused_by_name(change, tmp_path):
    damage, message = CHANGES[change]
    folder = edited(saved(tmp_path, token_config(**ONE)), damage)
    with pytest.raises(ValueError, match=message):
        read_adapter_files(folder)


def test_another_gates_tensors_are_refused(tmp_path):
    folder = edited(saved(tmp_path, token_config(**ONE)), lambda tensors: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"router": "dense"}))
    with pytest.raises(ValueError, match=r"holds balance_bias, router_weight of model.* router='dense' does not have"):
        read_adapter_files(folder)


def test_a_config_that_does_not_fit_the_tensors_is_refused(tmp_path):
    folder = edited(saved(tmp_path, task_config(**ONE)), lambda tensors: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (({"tasks": TASKS[:2]}, "task_embedding has shape"), ({"r": 5}, "A has shape")):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            read_adapter_files(folder)


def test_what_is_damaged_or_missing_is_refused(tmp_path):
    folder = saved(tmp_path, token_config(**ONE))
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="its tensors are not those that were saved"):
        read_adapter_files(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        read_adapter_files(folder)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_adapter_files(tmp_path / "nowhere")
