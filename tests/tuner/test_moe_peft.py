"""Adapters on a mixture's experts through PEFT: what its users do with any method."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

import models
from gates import GATES, batch, config, logits, randomise
from helpers import TASKS, assert_unchanged, fingerprint
from mixtures import BASES, EXPERTS, adapted, expert_config
from rank_experts import inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.layers import adapted_layers
from rank_experts.layers.experts import RankExpertExperts


@pytest.fixture(params=BASES)
def make(request):
    return BASES[request.param]


def peft_model(gate, make=models.mixtral, **kwargs):
    model = make()
    torch.manual_seed(0)
    return get_peft_model(model, expert_config(gate, **kwargs))


def expert_paths(model) -> set[str]:
    return {path for path, _ in adapted_layers(model)}


@pytest.mark.parametrize("gate", GATES)
def test_every_way_in_gives_the_same_adapter(make, gate):
    expected = logits(adapted(gate, make), batch(gate))
    assert torch.equal(logits(peft_model(gate, make), batch(gate)), expected)
    model = make()
    torch.manual_seed(0)
    assert torch.equal(logits(inject_adapter_in_model(expert_config(gate), model), batch(gate)), expected)
    model = make()
    torch.manual_seed(0)
    model.add_adapter(expert_config(gate))
    assert torch.equal(logits(model, batch(gate)), expected)


@pytest.mark.parametrize("gate", GATES)
def test_files_are_read_both_ways(make, gate, tmp_path):
    model = peft_model(gate, make)
    randomise(model)
    expected = logits(model, batch(gate))
    model.save_pretrained(tmp_path / "peft")
    save_rank_experts(model, tmp_path / "ours")
    for side in ("peft", "ours"):
        assert torch.equal(logits(load_rank_experts(make(), tmp_path / side), batch(gate)), expected)
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(make(), tmp_path / side, **options)
            assert torch.equal(logits(loaded, batch(gate)), expected)
        loaded = make()
        loaded.load_adapter(str(tmp_path / side))
        assert torch.equal(logits(loaded, batch(gate)), expected)
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    assert names == load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()


def test_the_files_keys_and_shapes(tmp_path):
    """A promise: docs/file-format.md."""
    save_rank_experts(adapted("token", layers_to_transform=[0], layers_pattern="layers"), tmp_path)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    expected = {}
    for m in range(4):
        for name, d_in, d_out in (("gate_up_proj", 32, 96), ("down_proj", 48, 32)):
            key = f"base_model.model.model.layers.0.mlp.experts.{name}.{m}.rank_experts."
            expected |= {f"{key}A": (4, d_in), f"{key}B": (d_out, 4)}
            expected |= {f"{key}router_weight": (4, d_in), f"{key}balance_bias": (4,)}
    assert found == expected


@pytest.mark.parametrize("way", ["ours", "peft"])
def test_damaged_files_change_nothing(way, tmp_path):
    save_rank_experts(adapted("token"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.experts.down_proj.2.rank_experts.B"
    damages = {
        "lacks|missing": {key: value for key, value in tensors.items() if key != name},
        "shape|has": tensors | {name: tensors[name].T.contiguous()},
        "not finite": tensors | {name: tensors[name] * torch.nan},
        "unexpected|holds": tensors | {name.replace("2.rank", "4.rank"): tensors[name].clone()},
    }
    for message, damaged in damages.items():
        save_file(damaged, file)
        model = models.mixtral()
        before = fingerprint(model)
        with pytest.raises(ValueError, match=message):
            load_rank_experts(model, tmp_path) if way == "ours" else PeftModel.from_pretrained(model, tmp_path)
        assert_unchanged(model, before)


def test_auto_classes(tmp_path):
    base = models.mixtral()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, expert_config("dense"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch("dense")), logits(model, batch("dense")), rtol=1e-5, atol=1e-5)


def test_several_adapters():
    """On the same experts and on others', with another gate, switched, disabled and deleted."""
    model = peft_model("token", target_parameters=EXPERTS[:1])
    base = logits(models.mixtral(), models.batch("llama"))
    randomise(model)
    first = logits(model, batch("token"))
    model.add_adapter("tasks", expert_config("task", target_modules=["q_proj"]))
    assert torch.equal(logits(model, batch("token")), first)
    model.set_adapter("tasks")
    randomise(model, "tasks")
    second = logits(model, batch("task"))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, models.batch("llama")), base, rtol=0, atol=0)
    assert [p.requires_grad for name, p in model.named_parameters() if "experts" in name and ".default" in name].count(
        True
    ) == 0
    names = ["default", "tasks", "__base__", "default"]
    mixed = logits(model, {**batch("task"), "adapter_names": names})
    for i, (expected, inputs) in enumerate(((first, "token"), (second, "task"), (base, "dense"), (first, "token"))):
        torch.testing.assert_close(mixed[i], expected[i], rtol=1e-5, atol=1e-5, msg=f"{i} {inputs}")
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch("task")), second)
    model.add_adapter("third", expert_config("dense"))
    model.set_adapter("third")
    model.delete_adapter("tasks")
    assert (logits(model, batch("dense")) - base).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["task", "dense"])
def test_merging_through_peft(make, gate):
    model = peft_model(gate, make)
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = models.batch("llama") | ({"task_ids": ["rte"] * 4} if gate == "task" else {})
    expected = logits(model, inputs)
    options = {"task": "rte"} if gate == "task" else {}
    model.merge_adapter(safe_merge=True, **options)
    assert model.get_model_status().merged_adapters
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    merged = model.merge_and_unload(**options)
    assert type(merged) is type(make())
    assert merged.state_dict().keys() == make().state_dict().keys()
    assert not any(isinstance(module, RankExpertExperts) for module in merged.modules())
    torch.testing.assert_close(logits(merged, models.batch("llama")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_unloading_gives_the_base_back(make, gate):
    model = peft_model(gate, make).unload()
    expected = make()
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(logits(model, models.batch("llama")), logits(expected, models.batch("llama")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_narrow_bases(dtype, autocast):
    model = models.mixtral().to(dtype)
    torch.manual_seed(0)
    model = get_peft_model(model, expert_config("token"), autocast_adapter_dtype=autocast).train()
    assert {p.dtype for name, p in model.named_parameters() if ".rank_experts." in name} == {
        torch.float32 if autocast else dtype
    }
    outputs = model(**batch("token"))
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    wide = adapted("token")
    wide.load_state_dict({name.removeprefix("base_model.model."): t for name, t in model.state_dict().items()})
    torch.testing.assert_close(logits(model, batch("token")).float(), logits(wide, batch("token")), rtol=0.1, atol=0.1)


def test_without_an_active_adapter_the_bases_own_implementation_runs(make):
    model = peft_model("dense", make)
    calls = []
    for module in model.modules():
        if isinstance(module, RankExpertExperts):
            module.base_layer.register_forward_hook(lambda *_: calls.append(1))
    logits(model, models.batch("llama"))
    assert not calls
    with model.disable_adapter():
        logits(model, models.batch("llama"))
    assert len(calls) == sum(isinstance(module, RankExpertExperts) for module in model.modules())


def test_status_and_counts():
    model = peft_model("dense")
    status = model.get_model_status()
    assert status.num_adapter_layers == 16
    assert status.trainable_params == sum(4 * 4 * (32 + 96) + 4 * 4 * (48 + 32) for _ in range(2))
    assert expert_paths(model) == {
        f"base_model.model.model.layers.{n}.mlp.experts.{name}.{m}"
        for n in range(2)
        for name in ("gate_up_proj", "down_proj")
        for m in range(4)
    }


def test_another_methods_experts_are_refused():
    from peft import LoraConfig

    model = get_peft_model(models.mixtral(), LoraConfig(target_modules=[], target_parameters=EXPERTS)).get_base_model()
    with pytest.raises(ValueError, match="No parameter of MixtralForCausalLM matches target_parameters"):
        inject_rank_experts(model, expert_config("dense"))


def test_all_linear_beside_the_experts():
    model = get_peft_model(models.mixtral(), config("task", target_parameters=EXPERTS))
    kinds = {path.split(".")[6] for path in expert_paths(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}
    randomise(model)
    inputs = models.batch("llama", labels=False)
    mixed = logits(model, inputs | {"task_ids": torch.tensor([0, 1, 2, 0])})
    for i, task in enumerate((0, 1, 2, 0)):
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        alone = logits(model, row | {"task_ids": [TASKS[task]]})
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-5)
