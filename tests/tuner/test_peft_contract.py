"""Every method of PEFT's public interface, for the three gates."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import models
from gates import GATES, batch, config, logits, peft_model, randomise
from helpers import OLD_PEFT, TASKS
from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, save_rank_experts, use_task
from rank_experts.layers import adapted_layers
from rank_experts.layers.linear import RankExpertLinear

pytestmark = pytest.mark.parametrize("gate", GATES)


def equal(one, other, **kwargs):
    torch.testing.assert_close(one, other, **({"rtol": 1e-5, "atol": 1e-6} | kwargs))


def differ(one, other):
    assert (one - other).abs().max() > 1e-3


@pytest.fixture
def base():
    return models.llama()


@pytest.fixture
def saved_base(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_lora_plus_optimiser_is_refused(gate):
    """It would give B no rate of its own, without a word, as it does for LoRA."""
    from peft.optimizers import create_loraplus_optimizer

    rates = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16.0}
    lora = get_peft_model(models.llama(), LoraConfig(target_modules=["q_proj"]))
    groups = create_loraplus_optimizer(lora, **rates).param_groups
    assert {id(p) for group in groups if group["lr"] == 1e-3 * 16 for p in group["params"]} == {
        id(p) for name, p in lora.named_parameters() if "lora_B" in name
    }
    with pytest.raises(ValueError, match=r"learning rate of A.*names end in '\.B'"):
        create_loraplus_optimizer(peft_model(gate), **rates)


# Making, saving and loading


def test_get_peft_model_freezes_the_base_and_trains_the_adapter(gate):
    model = peft_model(gate, task_type="CAUSAL_LM")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".rank_experts." in name}
    model(**batch(gate)).loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_pretrained_and_from_pretrained(gate, low_cpu_mem_usage, base, tmp_path):
    model = peft_model(gate, task_type="CAUSAL_LM")
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(loaded) is type(model)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_trains_on(gate, low_cpu_mem_usage, base, tmp_path):
    model = peft_model(gate)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    for trained in (model, loaded):
        torch.manual_seed(0)
        trained.train()
        trained(**batch(gate)).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, p in loaded.named_parameters():
        if p.requires_grad:
            equal(p.grad, grads.pop(name))
    assert not grads
    for _, layer in adapted_layers(loaded):
        assert all(load.sum() == 2 * batch(gate)["attention_mask"].sum() for load in layer.scope.loads.values())


def test_both_ways_of_saving_write_the_same_files(gate, base, tmp_path):
    model = peft_model(gate)
    randomise(model)
    model.save_pretrained(tmp_path / "peft")
    save_rank_experts(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "ours"))
    assert theirs.keys() == ours.keys()
    for key in theirs:
        equal(theirs[key], ours[key], rtol=0, atol=0)
    theirs, ours = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("peft", "ours"))
    theirs["target_modules"], ours["target_modules"] = sorted(theirs["target_modules"]), sorted(ours["target_modules"])
    assert {k: v for k, v in theirs.items() if k != "auto_mapping"} == {
        k: v for k, v in ours.items() if k != "auto_mapping"
    }
    loaded = load_rank_experts(base, tmp_path / "peft")
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)


@pytest.mark.parametrize("auto", [AutoPeftModelForCausalLM, AutoPeftModel])
def test_auto_peft_model(gate, auto, saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    task_type = "CAUSAL_LM" if auto is AutoPeftModelForCausalLM else None
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base), config(gate, task_type=task_type))
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)


def test_auto_peft_model_for_sequence_classification(gate, tmp_path):
    from transformers import AutoModelForSequenceClassification

    models.bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(gate, task_type="SEQ_CLS", target_modules=["query", "value"]))
    assert model.peft_config["default"].modules_to_save
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    equal(logits(loaded, batch(gate, "bert")), logits(model, batch(gate, "bert")), rtol=0, atol=0)


def test_the_config_by_itself(gate, tmp_path):
    made = config(gate, modules_to_save=["lm_head"], exclude_modules=["k_proj"], rank_pattern={"q_proj": 8})
    made.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RankExpertConfig)
    assert loaded == made
    assert loaded.peft_type.value == "RANK_EXPERTS"
    assert copy.deepcopy(made) == made


def test_inject_adapter_in_model_and_the_state_dict(gate, base, tmp_path):
    torch.manual_seed(0)
    model = inject_adapter_in_model(config(gate), base)
    assert model is base
    expected = logits(model, batch(gate))
    state = get_peft_model_state_dict(model)
    other = models.llama()
    inject_adapter_in_model(config(gate), other)
    differ(logits(other, batch(gate)), expected)
    outcome = set_peft_model_state_dict(other, state)
    assert not outcome.unexpected_keys
    equal(logits(other, batch(gate)), expected, rtol=0, atol=0)


def test_inject_adapter_in_model_by_the_keys_of_a_state_dict(gate, base):
    model = inject_adapter_in_model(config(gate, target_modules=["q_proj", "up_proj"]), base)
    state = get_peft_model_state_dict(model)
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        other = inject_adapter_in_model(config(gate), models.llama(), state_dict=state)
    adapted = {path.rpartition(".")[2] for path, _ in adapted_layers(other)}
    assert adapted == {"q_proj", "up_proj"}


def test_transformers_add_adapter(gate, base, tmp_path):
    plain = logits(base, models.batch("llama"))
    torch.manual_seed(0)
    base.add_adapter(config(gate), adapter_name="one")
    first = logits(base, batch(gate))
    differ(first, plain)
    base.add_adapter(config(gate), adapter_name="two")
    assert base.active_adapters() == ["two"]
    differ(logits(base, batch(gate)), first)
    base.set_adapter("one")
    equal(logits(base, batch(gate)), first)
    base.disable_adapters()
    equal(logits(base, batch(gate)), plain)
    base.enable_adapters()
    equal(logits(base, batch(gate)), first)
    if not OLD_PEFT:  # It would look for our layers under a prefix that it makes of the method's name.
        base.delete_adapter("two")
        equal(logits(base, batch(gate)), first)


def test_transformers_save_and_load_adapter(gate, base, tmp_path):
    base.add_adapter(config(gate))
    randomise(base)
    base.save_pretrained(tmp_path)
    loaded = models.llama()
    info = loaded.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    for (_, layer), (_, other) in zip(adapted_layers(base), adapted_layers(loaded), strict=True):
        for (name, tensor), value in zip(layer.state_dict().items(), other.state_dict().values(), strict=True):
            equal(tensor, value, rtol=0, atol=0, msg=name)
    equal(logits(loaded, batch(gate)), logits(base, batch(gate)), rtol=0, atol=0)
    assert get_peft_model_state_dict(base).keys() == loaded.get_adapter_state_dict().keys()


def test_transformers_reads_what_save_rank_experts_wrote(gate, base, tmp_path):
    inject_rank_experts(base, config(gate))
    save_rank_experts(base, tmp_path)
    loaded = models.llama()
    loaded.load_adapter(str(tmp_path), adapter_name="mine", is_trainable=True)
    equal(logits(loaded, batch(gate)), logits(base, batch(gate)), rtol=0, atol=0)
    loaded.train()
    loaded(**batch(gate)).loss.backward()


def test_from_pretrained_finds_the_adapter_beside_a_model(gate, saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved_base)
    model.add_adapter(config(gate))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert json.loads(file.read_text())["base_model_name_or_path"] == saved_base
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)


# Several adapters


def two_adapters(gate, **kwargs):
    model = peft_model(gate)
    torch.manual_seed(5)
    model.add_adapter("other", config(gate, **kwargs))
    return model


def test_adding_and_setting_adapters(gate):
    single = logits(peft_model(gate), batch(gate))
    model = two_adapters(gate)
    assert model.active_adapters == ["default"]
    equal(logits(model, batch(gate)), single)
    model.set_adapter("other")
    other = logits(model, batch(gate))
    differ(other, single)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".other" in name for name in trainable)
    model.set_adapter("default")
    equal(logits(model, batch(gate)), single)


def test_a_name_that_exists_is_refused_and_changes_nothing(gate):
    model = two_adapters(gate)
    before = logits(model, batch(gate))
    with pytest.raises(ValueError, match="other"):
        model.add_adapter("other", config(gate))
    equal(logits(model, batch(gate)), before, rtol=0, atol=0)


def test_adapters_on_different_layers(gate):
    model = peft_model(gate, target_modules=["q_proj"])
    before = logits(model, batch(gate))
    model.add_adapter("mlp", config(gate, target_modules=["up_proj"]))
    equal(logits(model, batch(gate)), before)
    model.set_adapter("mlp")
    differ(logits(model, batch(gate)), before)
    model.set_adapter("default")
    equal(logits(model, batch(gate)), before)


def test_two_active_adapters_add_up(gate):
    model = peft_model(gate, target_modules=["layers.1.mlp.down_proj"])
    model.add_adapter("other", config(gate, target_modules=["layers.1.mlp.down_proj"]))
    layer = next(layer for _, layer in adapted_layers(model))
    x = torch.randn(3, 48)
    outputs = {}
    with torch.no_grad():
        for names in (["default"], ["other"], ["default", "other"]):
            model.base_model.set_adapter(names)
            with use_task(model, "rte") if gate == "task" else torch.no_grad():
                outputs[len(outputs)] = layer(x) - layer.base_layer(x)
    equal(outputs[0] + outputs[1], outputs[2])


def test_deleting_adapters(gate):
    model = two_adapters(gate)
    before = logits(model, batch(gate))
    model.set_adapter("other")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert not any("other" in name for name in model.state_dict())
    equal(logits(model, batch(gate)), before)
    model.add_adapter("other", config(gate))
    model.set_adapter("other")
    differ(logits(model, batch(gate)), before)


def test_disable_adapter(gate):
    plain = logits(models.llama(), models.batch("llama"))
    model = peft_model(gate)
    adapted = logits(model, batch(gate))
    with model.disable_adapter():
        equal(logits(model, batch(gate)), plain, rtol=0, atol=0)
        # The base model needs no tasks.
        equal(logits(model, models.batch("llama")), plain, rtol=0, atol=0)
    equal(logits(model, batch(gate)), adapted, rtol=0, atol=0)
    model.base_model.disable_adapter_layers()
    equal(logits(model, batch(gate)), plain, rtol=0, atol=0)
    model.base_model.enable_adapter_layers()
    equal(logits(model, batch(gate)), adapted, rtol=0, atol=0)


def test_set_requires_grad(gate):
    model = two_adapters(gate)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["default", "other"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if ".rank_experts." in name}


def test_adapters_saved_apart_and_loaded_under_other_names(gate, base, tmp_path):
    model = two_adapters(gate)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "other"}
    default = logits(model, batch(gate))
    model.set_adapter("other")
    other = logits(model, batch(gate))
    loaded = PeftModel.from_pretrained(base, tmp_path, adapter_name="renamed")
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    equal(logits(loaded, batch(gate)), default, rtol=0, atol=0)
    loaded.set_adapter("second")
    equal(logits(loaded, batch(gate)), other, rtol=0, atol=0)


def test_an_adapter_may_be_called_like_a_module(gate, base, tmp_path):
    model = get_peft_model(base, config(gate), adapter_name="mlp")
    expected = logits(model, batch(gate))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "mlp" / "adapter_model.safetensors").keys()
    assert any(".mlp.up_proj.rank_experts.A" in key for key in keys)
    loaded = PeftModel.from_pretrained(models.llama(), tmp_path / "mlp")
    equal(logits(loaded, batch(gate)), expected, rtol=0, atol=0)


def test_mixed_adapter_batches(gate):
    model = two_adapters(gate)
    inputs = batch(gate, labels=False)
    alone = {"__base__": None, "default": None, "other": None}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = logits(model, inputs)
    names = ["other", "__base__", "default", "other"]
    mixed = logits(model, inputs | {"adapter_names": names})
    for row, name in enumerate(names):
        equal(mixed[row], alone[name][row])


def test_mixed_adapter_batches_in_generate(gate):
    model = two_adapters(gate)
    model.eval()
    inputs = batch(gate, size=2, length=4, labels=False)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mixed = model.generate(**inputs, **options, adapter_names=["default", "other"])
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        alone = model.generate(**inputs, **options)
        equal(torch.stack(mixed.logits)[:, row], torch.stack(alone.logits)[:, row])
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, adapter_names=["default", "other"])
    assert len(beams) == 2


def test_mixed_adapter_batches_refuse_training_and_unknown_names(gate):
    model = two_adapters(gate)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        model(**batch(gate), adapter_names=["default"] * 4)
    model.eval()
    with pytest.raises(ValueError, match="nope"):
        model(**batch(gate), adapter_names=["nope"] * 4)
    with pytest.raises(ValueError, match="3 adapter_names for 4 rows"):
        model(**batch(gate), adapter_names=["default"] * 3)


def test_gates_side_by_side(gate):
    """Adapters of all three gates on one model."""
    model = two_adapters(gate)
    before = logits(model, batch(gate))
    for other in GATES:
        model.add_adapter(f"a_{other}", config(other))
    equal(logits(model, batch("task")), before)
    for other in GATES:
        model.set_adapter(f"a_{other}")
        differ(logits(model, batch("task")), before)


# Merging


def merged_equals(gate, model, inputs, merge):
    """Run `merge` within the task's name where one is needed; the inputs are all of that task."""
    expected = logits(model, inputs)
    if gate == "task":
        with use_task(model, TASKS[1]):
            result = merge()
    else:
        result = merge()
    return expected, result


def one_task(gate):
    return batch(gate) | ({"task_ids": torch.ones(4, dtype=torch.int64)} if gate == "task" else {})


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(gate, safe_merge):
    model = peft_model(gate)
    if gate == "token":
        before = logits(model, batch(gate))
        with pytest.raises(ValueError, match="routes by token"):
            model.merge_and_unload(safe_merge=safe_merge)
        equal(logits(model, batch(gate)), before, rtol=0, atol=0)
        return
    expected, merged = merged_equals(gate, model, one_task(gate), lambda: model.merge_and_unload(safe_merge=safe_merge))
    assert type(merged) is type(models.llama())
    assert not hasattr(merged, "peft_config")
    assert merged.state_dict().keys() == models.llama().state_dict().keys()
    equal(logits(merged, models.batch("llama")), expected, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(merged)


def test_merge_and_unload_for_a_named_task(gate):
    if gate != "task":
        pytest.skip("only the task gate knows tasks")
    model = peft_model(gate)
    expected = logits(model, one_task(gate))
    with pytest.raises(ValueError, match="merged weight serves one"):
        model.merge_and_unload()
    merged = model.merge_and_unload(task=TASKS[1])
    equal(logits(merged, models.batch("llama")), expected, rtol=1e-4, atol=1e-5)


def test_safe_merge_refuses_what_is_not_finite(gate):
    if gate == "token":
        pytest.skip("does not merge")
    model = peft_model(gate)
    layers = [layer for _, layer in adapted_layers(model)]
    with torch.no_grad():
        layers[-1].rank_experts["default"].A[0, 0] = float("inf")
    before = [layer.base_layer.weight.clone() for layer in layers]
    with pytest.raises(ValueError, match="non-finite"):
        model.merge_and_unload(safe_merge=True, **({"task": TASKS[1]} if gate == "task" else {}))
    for layer, weight in zip(layers, before, strict=True):
        equal(layer.base_layer.weight, weight, rtol=0, atol=0)
        assert not layer.merged


@pytest.mark.skipif(OLD_PEFT, reason="this PEFT deletes merged adapters")
def test_deleting_a_merged_adapter_is_refused_in_pefts_words(gate):
    """A token gate does not merge, which the layers are told here."""
    lora = get_peft_model(models.llama(), LoraConfig(target_modules=["q_proj"]))
    lora.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged") as said_of_lora:
        lora.delete_adapter("default")
    model = peft_model(gate)
    for _, layer in adapted_layers(model):
        layer.merged_adapters.append("default")
    with pytest.raises(ValueError, match="while they are merged") as said:
        model.delete_adapter("default")
    assert str(said.value) == str(said_of_lora.value)


def test_merge_adapter_and_unmerge_adapter(gate):
    model = two_adapters(gate)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    if gate == "token":
        with pytest.raises(ValueError, match="routes by token"):
            model.merge_adapter()
    else:
        expected, _ = merged_equals(gate, model, one_task(gate), model.merge_adapter)
        assert all(layer.merged_adapters == ["default"] for _, layer in adapted_layers(model))
        equal(logits(model, one_task(gate)), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
    for name, p in model.named_parameters():
        equal(p, weights[name], rtol=0, atol=0)


def test_merging_some_adapters(gate):
    if gate == "token":
        pytest.skip("does not merge")
    model = two_adapters(gate)
    model.base_model.set_adapter(["default", "other"])
    both, _ = merged_equals(
        gate, model, one_task(gate), lambda: model.merge_adapter(adapter_names=["default", "other"], safe_merge=True)
    )
    equal(logits(model, one_task(gate)), both, rtol=1e-4, atol=1e-5)


def test_merged_and_disabled(gate):
    if gate == "token":
        pytest.skip("does not merge")
    plain = logits(models.llama(), models.batch("llama"))
    model = peft_model(gate)
    merged_equals(gate, model, one_task(gate), model.merge_adapter)
    with model.disable_adapter():
        equal(logits(model, one_task(gate)), plain, rtol=0, atol=0)


def test_unload(gate):
    plain = logits(models.llama(), models.batch("llama"))
    model = peft_model(gate)
    differ(logits(model, batch(gate)), plain)
    unloaded = model.unload()
    assert type(unloaded) is type(models.llama())
    assert not list(adapted_layers(unloaded))
    equal(logits(unloaded, models.batch("llama")), plain, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(unloaded, config(gate))


# Which modules


def test_modules_to_save(gate, base, tmp_path):
    model = get_peft_model(base, config(gate, modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]))
    assert model.base_model.model.lm_head.weight.requires_grad
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model, batch(gate))
    model.save_pretrained(tmp_path / "peft")
    save_rank_experts(model, tmp_path / "ours")
    for side in ("peft", "ours"):
        loaded = PeftModel.from_pretrained(models.llama(), tmp_path / side)
        equal(logits(loaded, batch(gate)), expected, rtol=0, atol=0)
        equal(logits(load_rank_experts(models.llama(), tmp_path / side), batch(gate)), expected, rtol=0, atol=0)


def test_rank_pattern_and_alpha_pattern(gate, tmp_path):
    model = peft_model(gate, rank_pattern={"q_proj": 8}, alpha_pattern={r"layers\.1\..*up_proj": 2})
    for path, layer in adapted_layers(model):
        r = 8 if path.endswith("q_proj") else 4
        alpha = 2 if "layers.1." in path and path.endswith("up_proj") else 16
        assert layer.rank_experts["default"].A.shape[0] == r
        assert layer.rank_experts["default"].B.shape[1] == r
        assert layer.rank_experts["default"].scale == alpha / (2 if gate == "token" else r)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.llama(), tmp_path)
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)


def test_exclude_modules_and_layers_to_transform(gate):
    model = peft_model(
        gate, target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["k_proj"], layers_to_transform=[1]
    )
    paths = [path for path, _ in adapted_layers(model.base_model.model)]
    assert paths == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    model = peft_model(gate, target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers")
    assert [path for path, _ in adapted_layers(model.base_model.model)] == ["model.layers.0.self_attn.q_proj"]


def test_default_target_modules(gate):
    model = peft_model(gate, target_modules=None)
    assert {path.rpartition(".")[2] for path, _ in adapted_layers(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("bias", ["none", "all", "rank_experts_only"])
def test_bias(gate, bias, tmp_path):
    if OLD_PEFT and bias != "none":
        with pytest.raises(ValueError, match="would not save the trained biases"):
            peft_model(gate, "bert", bias=bias, target_modules=["query"])
        return
    model = peft_model(gate, "bert", bias=bias, target_modules=["query"], modules_to_save=["classifier"])
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")}
    biases = {name for name in biases if "classifier" not in name}
    every = {name for name, _ in model.named_parameters() if name.endswith(".bias") and "classifier" not in name}
    assert (
        biases
        == {
            "none": set(),
            "all": every,
            "rank_experts_only": {name for name in every if "query" in name},
        }[bias]
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in biases:
                p.add_(1.0)
    expected = logits(model, batch(gate, "bert"))
    model.save_pretrained(tmp_path / "peft")
    save_rank_experts(model, tmp_path / "ours")
    for side in ("peft", "ours"):
        loaded = PeftModel.from_pretrained(models.bert(), tmp_path / side)
        equal(logits(loaded, batch(gate, "bert")), expected, rtol=0, atol=0)
        loaded = load_rank_experts(models.bert(), tmp_path / side)
        equal(logits(loaded, batch(gate, "bert")), expected, rtol=0, atol=0)


def test_layers_of_another_kind_are_refused_by_name(gate, base):
    with pytest.raises(TypeError, match=r"model\.embed_tokens is a Embedding"):
        get_peft_model(base, config(gate, target_modules=["embed_tokens"]))
    assert not list(adapted_layers(base))


def test_layers_of_another_method_are_refused_by_name(gate, base):
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base)
    with pytest.raises(TypeError, match=r"q_proj is already adapted by peft\.tuners\.lora"):
        inject_rank_experts(base, config(gate, target_modules=["q_proj"]), "mine")


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(gate, dtype, autocast_adapter_dtype, tmp_path):
    model = get_peft_model(models.llama().to(dtype), config(gate), autocast_adapter_dtype=autocast_adapter_dtype)
    for name, tensor in model.state_dict().items():
        if "balance_bias" in name or (".rank_experts." in name and autocast_adapter_dtype):
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == dtype, name
    exact = logits(copy.deepcopy(model).float(), batch(gate))
    assert logits(model, batch(gate)).dtype == dtype
    # On average: where two experts are nearly equal, a rounded input chooses the other one.
    assert (logits(model, batch(gate)).float() - exact).abs().mean() < 0.03
    model.train()
    model(**batch(gate)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        models.llama().to(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype
    )
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(gate, dtype):
    model = peft_model(gate)
    exact = logits(model, batch(gate))
    with torch.autocast("cpu", dtype=dtype):
        low = logits(model, batch(gate))
        model.train()
        model(**batch(gate)).loss.backward()
    assert (low.float() - exact).abs().mean() < 0.03
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_casts_leave_the_balancing_bias_in_float32(gate):
    model = peft_model(gate)
    randomise(model)
    before = {name: b.clone() for name, b in model.named_buffers() if "balance_bias" in name}
    assert bool(before) == (gate == "token")
    for name, b in model.to(torch.bfloat16).named_buffers():
        if name in before:
            equal(b, before[name], rtol=0, atol=0)


def test_meta_base_and_low_cpu_mem_usage(gate):
    with torch.device("meta"):
        base = models.llama()
    model = get_peft_model(base, config(gate), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert not any(t.is_meta for _, layer in adapted_layers(model) for t in layer.scope.loads.values())


def test_injecting_on_meta_and_loading(gate, base):
    torch.manual_seed(0)
    full = inject_adapter_in_model(config(gate), models.llama())
    model = inject_adapter_in_model(config(gate), base, low_cpu_mem_usage=True)
    assert all(layer.rank_experts["default"].A.is_meta for _, layer in adapted_layers(model))
    set_peft_model_state_dict(model, get_peft_model_state_dict(full), low_cpu_mem_usage=True)
    equal(logits(model, batch(gate)), logits(full, batch(gate)), rtol=0, atol=0)
    model.train()
    model(**batch(gate))


def test_inference_mode(gate, tmp_path):
    model = peft_model(gate, inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_tied_weights(gate, tmp_path):
    base = models.llama(tie_word_embeddings=True)
    model = get_peft_model(base, config(gate))
    expected = logits(model, batch(gate))
    model.save_pretrained(tmp_path)
    assert not any("embed_tokens" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(models.llama(tie_word_embeddings=True), tmp_path)
    equal(logits(loaded, batch(gate)), expected, rtol=0, atol=0)
    if gate == "token":
        return
    expected, merged = merged_equals(gate, model, one_task(gate), model.merge_and_unload)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    equal(logits(merged, models.batch("llama")), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_tied_head(gate, tmp_path):
    base = models.llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model = get_peft_model(base, config(gate, target_modules=["lm_head"]))
    assert model.base_model.model.lm_head.base_layer.weight is base.model.embed_tokens.weight
    plain = logits(models.llama(tie_word_embeddings=True), models.batch("llama"))
    differ(logits(model, batch(gate)), plain)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(models.llama(tie_word_embeddings=True), tmp_path)
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)
    save_rank_experts(model, tmp_path / "ours")
    loaded = load_rank_experts(models.llama(tie_word_embeddings=True), tmp_path / "ours")
    equal(logits(loaded, batch(gate)), logits(model, batch(gate)), rtol=0, atol=0)


# Reports


def test_print_trainable_parameters(gate, capsys):
    model = peft_model(gate)
    own = sum(p.numel() for name, p in model.named_parameters() if ".rank_experts." in name)
    every = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (own, every)
    model.print_trainable_parameters()
    assert f"trainable params: {own:,} || all params: {every:,}" in capsys.readouterr().out


def test_status(gate):
    model = two_adapters(gate)
    status = get_model_status(model)
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.merged_adapters == []
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.num_adapter_layers == len(list(adapted_layers(model))) == 14
    layer = get_layer_status(model)[0]
    assert layer.module_type == "rank_experts.RankExpertLinear"
    assert layer.requires_grad == {"default": True, "other": False}
    with model.disable_adapter():
        assert not get_model_status(model).enabled
    assert get_layer_status(inject_rank_experts(models.llama(), config(gate)))[0].enabled


def test_a_copied_model_is_independent(gate):
    model = peft_model(gate)
    before = logits(model, batch(gate))
    copied = copy.deepcopy(model)
    equal(logits(copied, batch(gate)), before, rtol=0, atol=0)
    randomise(copied)
    differ(logits(copied, batch(gate)), before)
    equal(logits(model, batch(gate)), before, rtol=0, atol=0)


def test_supports_lora_conversion(gate):
    model = peft_model(gate)
    assert model.supports_lora_conversion() is (gate == "dense")


def test_layers_are_ours(gate):
    assert all(type(layer) is RankExpertLinear for _, layer in adapted_layers(peft_model(gate)))
