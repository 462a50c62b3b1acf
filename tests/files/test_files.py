"""The files on disk: their keys and shapes, the way back, and what loading refuses."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import CONFIGS, TASKS, assert_unchanged, fingerprint, needs_trained_biases, task_config, token_config
from models import batch, bert, llama
from rank_experts import inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.layers import adapted_layers

LAYER = "base_model.model.model.layers.1.mlp.down_proj.rank_experts."  # (32, 48)
PROMISED = {
    "dense": {"A": (4, 48), "B": (32, 4)},
    "token": {"A": (16, 48), "B": (32, 16), "router_weight": (16, 48), "balance_bias": (16,)},
    "blocks": {"A": (16, 48), "B": (32, 16), "router_weight": (4, 48), "balance_bias": (4,)},
    "task": {
        "A": (4, 48),
        "B": (32, 4),
        "task_embedding": (3, 8),
        "gate_weight": (4, 8),
        "gate_bias": (4,),
        "projection": (8, 48),
    },
}


def make(kind, **kwargs):
    extra = {"task_embedding_dim": 8} if kind == "task" else {}
    return inject_rank_experts(llama(), CONFIGS[kind](**extra, **kwargs))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_keys_and_shapes_are_as_promised(kind, adapter_name, tmp_path):
    model = inject_rank_experts(
        llama(), CONFIGS[kind](**({"task_embedding_dim": 8} if kind == "task" else {})), adapter_name
    )
    save_rank_experts(model, tmp_path, adapter_name)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found = {name.removeprefix(LAYER): tuple(t.shape) for name, t in tensors.items() if name.startswith(LAYER)}
    assert found == PROMISED[kind]
    assert len(tensors) == len(PROMISED[kind]) * len(list(adapted_layers(model)))
    if kind in ("token", "blocks"):
        assert tensors[LAYER + "balance_bias"].dtype == torch.float32
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["format_version"]) == ("RANK_EXPERTS", 1)


def test_without_a_projection_there_is_none_in_the_file(tmp_path):
    save_rank_experts(inject_rank_experts(llama(), task_config()), tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "projection" in name]


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_writes_the_same_files(kind, tmp_path):
    model = make(kind)
    save_rank_experts(model, tmp_path / "ours")
    wrapped = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "pefts")
    save_rank_experts(wrapped, tmp_path / "wrapped")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for other in ("pefts", "wrapped"):
        theirs = load_file(tmp_path / other / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        load_rank_experts(llama(), tmp_path / other)


def test_loading_freezes_unless_it_is_to_be_trained(tmp_path):
    save_rank_experts(make("token"), tmp_path)
    assert not any(p.requires_grad for p in load_rank_experts(llama(), tmp_path).parameters())
    model = load_rank_experts(llama(), tmp_path, is_trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if "rank_expert" in n
    ]


def test_the_learnt_bias_is_saved_and_loaded(tmp_path):
    model = make("token")
    for _, layer in adapted_layers(model):
        layer.rank_experts["default"].balance_bias.uniform_()
    model.to(torch.bfloat16)
    save_rank_experts(model, tmp_path)
    loaded = dict(adapted_layers(load_rank_experts(llama().to(torch.bfloat16), tmp_path)))
    for path, layer in adapted_layers(model):
        expected = layer.rank_experts["default"].balance_bias
        got = loaded[path].rank_experts["default"].balance_bias
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@needs_trained_biases
def test_trained_biases_are_saved_and_loaded(tmp_path):
    for bias in ("all", "rank_experts_only"):
        model = inject_rank_experts(bert(), token_config(target_modules=["query"], bias=bias)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and name.endswith("bias"):
                    parameter.add_(0.5)
        save_rank_experts(model, tmp_path / bias)
        loaded = load_rank_experts(bert(), tmp_path / bias).eval()
        assert torch.equal(loaded(**batch("bert")).logits, model(**batch("bert")).logits)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    # As another program would write them: without our digest.
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_value(tensors, name, value):
    tensors[name].view(-1)[0] = value


REFUSED = {
    "no folder": (
        lambda folder: [f.unlink() for f in folder.iterdir()] and folder.rmdir(),
        FileNotFoundError,
        "is not a folder",
    ),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        FileNotFoundError,
        "holds no adapter_config.json",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "holds no adapter_model.safetensors",
    ),
    "not json": (lambda folder: (folder / "adapter_config.json").write_text("{"), ValueError, "is not JSON"),
    "no object": (lambda folder: (folder / "adapter_config.json").write_text("[]"), ValueError, "holds a list"),
    "another method": (lambda folder: edit_config(folder, peft_type="LORA"), ValueError, "peft_type 'LORA'.*PeftModel"),
    "newer format": (lambda folder: edit_config(folder, format_version=2), ValueError, "format_version 2.*Upgrade"),
    "unknown field": (
        lambda folder: edit_config(folder, topk=3),
        ValueError,
        "unknown fields \\['topk'\\].*nearest is 'top_k'",
    ),
    "value out of range": (lambda folder: edit_config(folder, top_k=99), ValueError, "top_k=99 is outside"),
    "wrong type": (lambda folder: edit_config(folder, r="16"), ValueError, "r='16': expected a whole number"),
    "missing tensor": (
        lambda folder: edit_tensors(folder, lambda t: t.pop(LAYER + "A")),
        ValueError,
        r"lacks .*down_proj\.rank_experts.A\..*is this that model|lacks .*down_proj\.rank_experts.A\.",
    ),
    "unexpected tensor": (
        lambda folder: edit_tensors(folder, lambda t: t.update({LAYER + "C": torch.zeros(2)})),
        ValueError,
        r"unexpected tensors: .*rank_experts.C",
    ),
    "misshapen tensor": (
        lambda folder: edit_tensors(folder, lambda t: t.update({LAYER + "A": torch.zeros(16, 47)})),
        ValueError,
        r"rank_experts.A has shape \(16, 47\), expected \(16, 48\)",
    ),
    "NaN": (
        lambda folder: edit_tensors(folder, lambda t: set_value(t, LAYER + "B", float("nan"))),
        ValueError,
        r"rank_experts.B has values that are not finite",
    ),
    "infinite": (
        lambda folder: edit_tensors(folder, lambda t: set_value(t, LAYER + "balance_bias", float("inf"))),
        ValueError,
        r"balance_bias has values that are not finite",
    ),
    "integers": (
        lambda folder: edit_tensors(folder, lambda t: t.update({LAYER + "A": torch.zeros(16, 48, dtype=torch.int32)})),
        ValueError,
        r"rank_experts.A is torch.int32",
    ),
    "damaged": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....."),
        ValueError,
        "is damaged",
    ),
    "cut off": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-100]
        ),
        ValueError,
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_loading_is_all_or_nothing(case, tmp_path):
    damage, error, message = REFUSED[case]
    folder = tmp_path / "adapter"
    save_rank_experts(make("token"), folder)
    damage(folder)
    model = llama()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        load_rank_experts(model, folder)
    assert_unchanged(model, before)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    save_rank_experts(make("token"), tmp_path / "small")
    model = llama(hidden_size=64)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"has shape .* expected .*the adapter was trained on"):
        load_rank_experts(model, tmp_path / "small")
    assert_unchanged(model, before)
    model = llama(num_hidden_layers=3)
    before = fingerprint(model)
    # "all-linear" was written out as the names of two layers; a third layer has none of them.
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert not any(".2." in name for name in config["target_modules"])
    with pytest.raises(ValueError, match=r"No module|lacks"):
        load_rank_experts(bert(), tmp_path / "small")
    assert_unchanged(model, before)


def test_a_lora_folder_is_refused(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type 'LORA'"):
        load_rank_experts(llama(), tmp_path)


def test_loading_over_an_existing_name_is_refused(tmp_path):
    model = make("task")
    save_rank_experts(model, tmp_path)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_rank_experts(model, tmp_path)
    assert_unchanged(model, before)
    load_rank_experts(model, tmp_path, adapter_name="again")
    inputs = batch("llama") | {"task_ids": torch.tensor([0, 1, 2, 0])}
    model.eval()
    again = model(**inputs).logits
    for _, layer in adapted_layers(model):
        layer.set_adapter("default")
    assert torch.equal(model(**inputs).logits, again)


@pytest.mark.parametrize("read", ["ours", "peft"])
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_field_of_a_newer_peft_that_holds_nothing_is_left_out(value, read, tmp_path):
    model = inject_rank_experts(llama(), token_config())
    save_rank_experts(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new_in_peft": value, "peft_version": "99.0.0"}))
    loaded = {"ours": load_rank_experts, "peft": PeftModel.from_pretrained}[read](llama(), tmp_path)
    inputs = batch("llama")
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("value", [True, 1, "new", ["x"], 0.5, 0])
def test_a_field_of_a_newer_peft_that_holds_something_is_refused_by_name(value, tmp_path):
    save_rank_experts(inject_rank_experts(llama(), token_config()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new_in_peft": value}))
    for load in (load_rank_experts, PeftModel.from_pretrained):
        model = llama()
        before = fingerprint(model)
        with pytest.raises(ValueError, match=r"unknown fields \['new_in_peft'\].*newer"):
            load(model, tmp_path)
        assert_unchanged(model, before)


def test_saving_an_unknown_adapter_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"no rank-expert adapter 'defualt'; it has \['default'\].*nearest is 'default'"
    ):
        save_rank_experts(make("token"), tmp_path, "defualt")
    with pytest.raises(ValueError, match="has no rank-expert adapter"):
        save_rank_experts(llama(), tmp_path)


def test_task_names_travel_with_the_adapter(tmp_path):
    save_rank_experts(make("task"), tmp_path)
    model = load_rank_experts(llama(), tmp_path)
    assert next(adapted_layers(model))[1].scope.tasks["default"] == tuple(TASKS)


def test_a_model_without_values_is_refused(tmp_path):
    save_rank_experts(make("token"), tmp_path)
    base = llama().to("meta")
    before = str(base)
    with pytest.raises(ValueError, match="LlamaForCausalLM lies on the meta device"):
        load_rank_experts(base, tmp_path)
    assert str(base) == before
