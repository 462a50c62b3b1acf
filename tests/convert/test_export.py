"""Exact exports: a plain PEFT LoRA checkpoint that computes what the adapter computes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from helpers import needs_trained_biases
from models import MODELS, batch
from rank_experts import (
    RankExpertConfig,
    export_lora,
    export_loras,
    inject_rank_experts,
    save_rank_experts,
    use_task,
)
from rank_experts.convert.export import name_targets

TASKS = ["cola", "mnli", "rte"]
SHAPES = ("llama", "t5", "bert", "gpt2")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def more(**kwargs) -> RankExpertConfig:
    options = {"r": 6, "alpha": 12, "target_modules": "all-linear", "init_weights": False}
    return RankExpertConfig.more(TASKS, **(options | kwargs))


def adapted(name, config, dtype=torch.float32):
    """The base model (a copy) and the adapted one, whose outputs differ clearly."""
    base = MODELS[name]().to(dtype).eval()
    return copy.deepcopy(base), inject_rank_experts(base, config).eval()


@torch.no_grad()
def logits(model, name):
    return model(**batch(name, labels=name == "t5")).logits.float()


def close(actual, expected, dtype):
    # Relative to the largest logit, and in float32 to 1 where it is smaller: other sums are rounded otherwise.
    size = expected.abs().max().clamp(min=1.0 if dtype == torch.float32 else 0.0)
    return (actual - expected).abs().max() <= TOLERANCE[dtype] * size


def no_trace(model):
    return not any(type(module).__module__.startswith("rank_experts") for module in model.modules()) and not any(
        "forward" in module.__dict__ for module in model.modules()
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scaling", ["linear", "quadratic", "none"])
def test_one_task_gives_the_same_logits_in_peft(tmp_path, name, dtype, scaling):
    base, model = adapted(name, more(rank_scaling=scaling), dtype)
    without = logits(base, name)
    for task in TASKS:
        with use_task(model, task):
            expected = logits(model, name)
        assert not close(without, expected, dtype), "the adapter does nothing: the test would prove nothing"
        assert export_lora(model, tmp_path / task, task=task) is None
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / task).eval()
        assert no_trace(loaded)
        assert close(logits(loaded, name), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_dense_with_rank_and_alpha_patterns(tmp_path, name, dtype):
    first = next(
        path
        for path, module in MODELS[name]().named_modules()
        if "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__
    )
    config = RankExpertConfig.lora(
        r=4,
        alpha=8,
        target_modules="all-linear",
        init_weights=False,
        rank_pattern={first: 7},
        alpha_pattern={first: 3},
    )
    base, model = adapted(name, config, dtype)
    expected = logits(model, name)
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert close(logits(loaded, name), expected, dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_has_one_rank_and_the_config_no_patterns(tmp_path, name):
    _, model = adapted(name, more())
    export_lora(model, tmp_path / "lora", task="mnli")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["fan_in_fan_out"] == (name == "gpt2")
    ranks = {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in tensors.items()}
    assert ranks == {config["r"]}
    used = [int((tensor != 0).any(1).sum()) for key, tensor in tensors.items() if "lora_A" in key]
    assert max(used) == config["r"], "no more ranks than the task uses"
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_for_each_task_of_one_rank(tmp_path, name, dtype):
    base, model = adapted(name, more(), dtype)
    assert export_loras(model, tmp_path / "all") is None
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(TASKS)
    ranks = {json.loads((tmp_path / "all" / task / "adapter_config.json").read_text())["r"] for task in TASKS}
    assert len(ranks) == 1
    for task in TASKS:
        with use_task(model, task):
            expected = logits(model, name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "all" / task).eval()
        assert close(logits(loaded, name), expected, dtype)


WITHOUT_US = """
import sys
sys.modules["rank_experts"] = None  # an import of it fails
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification
from models import batch

folder = sys.argv[1]
base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base")
model = PeftModel.from_pretrained(base, f"{folder}/lora")
with torch.no_grad():
    save_file({"logits": model.eval()(**batch("bert", labels=False)).logits}, f"{folder}/logits.safetensors")
"""


def test_a_process_without_this_library_loads_it(tmp_path):
    base, model = adapted("bert", more())
    base.save_pretrained(tmp_path / "base")
    with use_task(model, "rte"):
        expected = logits(model, "bert")
    export_lora(model, tmp_path / "lora", task="rte")
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_US, str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    assert close(load_file(tmp_path / "logits.safetensors")["logits"], expected, torch.float32)


def test_a_single_task_needs_no_name_and_no_folder(tmp_path):
    base, model = adapted("bert", RankExpertConfig.more(["only"], r=4, target_modules=["query"], init_weights=False))
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert close(logits(loaded, "bert"), logits(model, "bert"), torch.float32)


def test_r_fills_up_with_zeros_and_never_cuts(tmp_path):
    base, model = adapted("bert", more(r=6))
    with use_task(model, "rte"):
        expected = logits(model, "bert")
    export_lora(model, tmp_path / "wide", task="rte", r=16)
    assert json.loads((tmp_path / "wide/adapter_config.json").read_text())["r"] == 16
    loaded = PeftModel.from_pretrained(base, tmp_path / "wide").eval()
    assert close(logits(loaded, "bert"), expected, torch.float32)
    export_lora(model, tmp_path / "own", task="rte")
    needed = json.loads((tmp_path / "own/adapter_config.json").read_text())["r"]
    export_lora(model, tmp_path / "just", task="rte", r=needed)
    assert (tmp_path / "just/adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match=rf"r={needed - 1}: .* needs {needed} ranks"):
        export_lora(model, tmp_path / "narrow", task="rte", r=needed - 1)
    assert not (tmp_path / "narrow").exists()


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "PeftModel"])
def test_saved_modules_are_carried_along(tmp_path, wrapped):
    base = MODELS["bert"]().eval()
    config = more(modules_to_save=["classifier"], target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), config) if wrapped else inject_rank_experts(copy.deepcopy(base), config)
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "classifier.modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    injected = model.base_model.model if wrapped else model
    with use_task(injected, "cola"):
        expected = logits(model, "bert")
    export_lora(model, tmp_path / "lora", task="cola")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert close(logits(loaded, "bert"), expected, torch.float32)


@needs_trained_biases
@pytest.mark.parametrize("bias", ["all", "rank_experts_only"])
def test_trained_biases_are_carried_along(tmp_path, bias):
    base, model = adapted("bert", RankExpertConfig.lora(r=4, target_modules=["query"], init_weights=False, bias=bias))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert close(logits(loaded, "bert"), logits(model, "bert"), torch.float32)


def test_the_model_is_left_as_it_is(tmp_path):
    _, model = adapted("bert", more())
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_lora(model, tmp_path / "lora", task="cola")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_merged_adapter_exports_the_same(tmp_path):
    from rank_experts import merge_rank_experts

    _, model = adapted("bert", more())
    export_lora(model, tmp_path / "before", task="cola")
    merge_rank_experts(model, task="mnli")
    export_lora(model, tmp_path / "after", task="cola")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_per_task_folders_swap_hot_in_peft(tmp_path):
    base, model = adapted("llama", more())
    export_loras(model, tmp_path / "all")
    served = PeftModel.from_pretrained(base, tmp_path / "all/cola").eval()
    for task in ("mnli", "rte", "cola"):
        hotswap_adapter(served, str(tmp_path / "all" / task), adapter_name="default")
        with use_task(model, task):
            assert close(logits(served, "llama"), logits(model, "llama"), torch.float32)


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    _, model = adapted("bert", more())
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/README.md").write_text("mine")
    export_lora(model, tmp_path / "lora", task="cola")
    export_lora(model, tmp_path / "lora", task="rte")
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "lora"]


def test_another_adapter_is_left_out(tmp_path):
    base, model = adapted("bert", RankExpertConfig.lora(r=4, target_modules=["query"], init_weights=False))
    expected = logits(model, "bert")
    inject_rank_experts(model, more(target_modules=["query", "key"]), "tasks")
    export_lora(model, tmp_path / "lora", adapter_name="default")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert close(logits(loaded, "bert"), expected, torch.float32)


def test_targets_are_named_so_that_no_other_module_matches():
    names = ["a", "a.q", "a.k", "b", "b.q", "b.head", "b.head.k"]
    assert name_targets(["a.q", "b.q"], names) == ["q"]
    assert name_targets(["a.k"], names) == ["a.k"]
    assert name_targets(["a.q", "b.q"], [*names, "a.q.base_layer", "b.modules_to_save.default.q"]) == ["q"]
    assert name_targets(["head.k"], ["head", "head.k", "b.head", "b.head.k"]) == r"head\.k"


def test_bad_input_writes_nothing(tmp_path):
    _, model = adapted("bert", more())
    cases = [
        ({}, r"routes by task and knows \['cola', 'mnli', 'rte'\].*task=.*export_loras"),
        ({"task": "rtee"}, "'rtee' is unknown .* 'mnli'.* The nearest is 'rte'"),
        ({"adapter_name": "defalt"}, "no rank-expert adapter 'defalt'.*nearest is 'default'"),
        ({"calibration": [batch("bert")]}, "does not route by token"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            export_lora(model, tmp_path / "lora", **arguments)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".B"))[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lora_B.weight has values that are not finite"):
        export_lora(model, tmp_path / "lora", task="rte")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    _, model = adapted("bert", more())
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_lora(model, tmp_path / "file", task="cola")


def test_a_token_gate_without_calibration_is_refused(tmp_path):
    _, model = adapted("bert", RankExpertConfig.smora(r=8, top_k=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"no exact .*calibration=dataloader.*save_rank_experts"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="knows no tasks"):
        export_lora(model, tmp_path / "lora", task="rte")
    assert not (tmp_path / "lora").exists()


def test_task_names_that_are_no_folder_names(tmp_path):
    _, model = adapted("bert", RankExpertConfig.more(["a/b", "c"], r=4, target_modules=["query"]))
    with pytest.raises(ValueError, match="'a/b' cannot be a folder's name"):
        export_loras(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    export_lora(model, tmp_path / "lora", task="a/b")
    assert (tmp_path / "lora/adapter_config.json").exists()


def test_a_folder_for_each_task_needs_a_task_gate(tmp_path):
    for config, instead in (
        (RankExpertConfig.lora(r=4, target_modules=["query"]), r"has router 'dense' and knows no tasks.*export_lora\("),
        (RankExpertConfig.smora(r=8, top_k=2, target_modules=["query"]), r"has router 'token' and knows no tasks"),
    ):
        _, model = adapted("bert", config)
        with pytest.raises(ValueError, match=instead):
            export_loras(model, tmp_path / "loras")
    _, model = adapted("bert", more())
    with pytest.raises(ValueError, match=r"r=1: adapter 'default' needs \d+ ranks"):
        export_loras(model, tmp_path / "loras", r=1)
    assert list(tmp_path.iterdir()) == []


def test_one_task_has_a_folder_too(tmp_path):
    _, model = adapted("bert", RankExpertConfig.more(["only"], r=4, target_modules=["query"], init_weights=False))
    export_loras(model, tmp_path / "loras", r=6)
    assert json.loads((tmp_path / "loras/only/adapter_config.json").read_text())["r"] == 6


def test_round_trip_through_our_own_files_exports_the_same(tmp_path):
    from rank_experts import load_rank_experts

    base, model = adapted("bert", more())
    save_rank_experts(model, tmp_path / "ours")
    again = load_rank_experts(base, tmp_path / "ours")
    for name, source in (("a", model), ("b", again)):
        export_lora(source, tmp_path / name, task="rte")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
