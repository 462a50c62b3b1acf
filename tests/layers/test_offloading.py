"""Models that accelerate has offloaded to the CPU or the disk, before and after they got an adapter."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from gates import GATES, batch, config, logits, randomise
from helpers import CONFIGS
from mixtures import expert_config
from rank_experts import (
    export_lora,
    inject_rank_experts,
    load_rank_experts,
    merge_rank_experts,
    prune_rank_experts,
    save_rank_experts,
    unmerge_rank_experts,
    update_router_bias,
)
from rank_experts.layers import adapted_layers
from rank_experts.reports import routing_report

pytestmark = pytest.mark.filterwarnings("ignore:.*offload.*")


def dispatched(model, folder) -> None:
    """One layer and the head's weights on the disk, the rest in memory."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    device_map = {prefix + part: "cpu" for part in parts}
    device_map |= {prefix + part: "disk" for part in ("model.layers.1", "lm_head")}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


WAYS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "cpu, buffers": lambda model, folder: cpu_offload(model, execution_device="cpu", offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "dispatch": dispatched,
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
ADAPTERS = [*GATES, "lora"]


def base():
    # With a head of its own: tied weights are another matter.
    return models.llama(tie_word_embeddings=False)


def adapted(adapter: str, model=None):
    """A PeftModel with a random adapter of ours, or with LoRA."""
    model = base() if model is None else model
    torch.manual_seed(0)
    if adapter == "lora":
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return get_peft_model(model, config(adapter))


def inputs(adapter: str) -> dict[str, torch.Tensor]:
    return batch("dense" if adapter == "lora" else adapter)


@EVERY_WAY
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_offloaded_model_computes_what_it_did(adapter, way, tmp_path):
    model = adapted(adapter)
    if adapter != "lora":
        randomise(model)
    expected = logits(model, inputs(adapter))
    WAYS[way](model, tmp_path)
    assert any(p.is_meta for name, p in model.named_parameters() if ".default" in name)
    assert torch.equal(logits(model, inputs(adapter)), expected)
    assert torch.equal(logits(model, inputs(adapter)), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_dispatching_left_in_memory_trains(adapter, tmp_path):
    whole, model = adapted(adapter), adapted(adapter)
    dispatched(model, tmp_path)
    for one in (whole, model):
        one.train()
        one(**inputs(adapter)).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all(".layers.0." in name for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, whole.get_parameter(name).grad, msg=name)


@EVERY_WAY
@pytest.mark.parametrize("add", [inject_rank_experts, get_peft_model])
@pytest.mark.parametrize("gate", GATES)
def test_an_adapter_on_an_offloaded_base_trains(gate, add, way, tmp_path):
    """PEFT puts LoRA on the meta device there, and its first backward fails."""
    model, whole = base(), base()
    WAYS[way](model, tmp_path)
    torch.manual_seed(0)
    model = add(model, config(gate))
    torch.manual_seed(0)
    whole = add(whole, config(gate))
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    assert torch.equal(logits(model, batch(gate)), logits(whole, batch(gate)))
    for one in (whole, model):
        one.train()
        one(**batch(gate)).loss.backward()
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    assert trained
    for name in trained:
        torch.testing.assert_close(model.get_parameter(name).grad, whole.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("load", ["ours", "peft"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loading_onto_a_device_map_with_too_little_memory(adapter, load, tmp_path, monkeypatch):
    if adapter == "lora" and load == "ours":
        return
    monkeypatch.chdir(tmp_path)  # PEFT writes the files of the disk's part below the working directory
    base().save_pretrained(tmp_path / "base")
    model = adapted(adapter)
    if adapter != "lora":
        randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, inputs(adapter))
    # Embeddings, one layer and a bit: the rest goes to the disk.
    memory = {"cpu": "45KB"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map="auto", max_memory=memory, offload_folder=str(tmp_path / "offload")
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    if load == "ours":
        loaded = load_rank_experts(offloaded, tmp_path / "adapter")
    else:
        loaded = PeftModel.from_pretrained(
            offloaded, tmp_path / "adapter", max_memory=memory, offload_folder=str(tmp_path / "again")
        )
    torch.testing.assert_close(logits(loaded, inputs(adapter)), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("gate", GATES)
def test_loading_onto_a_model_that_is_offloaded(gate, way, low_cpu_mem_usage, tmp_path):
    model = adapted(gate)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    offloaded = base()
    WAYS[way](offloaded, tmp_path / "offload")
    loaded = PeftModel.from_pretrained(offloaded, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, batch(gate)), logits(model, batch(gate)))


@EVERY_WAY
@pytest.mark.parametrize("adapter", ["task", "dense", "lora"])
def test_merging_and_unmerging(adapter, way, tmp_path):
    model = adapted(adapter)
    one_task = inputs(adapter) | ({"task_ids": torch.ones(4, dtype=torch.int64)} if adapter == "task" else {})
    plain = {name: value for name, value in one_task.items() if name != "task_ids"}
    expected = logits(model, one_task)
    WAYS[way](model, tmp_path)
    if adapter == "lora":
        model.merge_adapter()
    else:
        merge_rank_experts(model, task="mnli" if adapter == "task" else None, safe_merge=True)
    torch.testing.assert_close(logits(model, plain), expected, rtol=1e-4, atol=1e-4)
    assert (logits(model, plain) - logits(base(), plain)).abs().max() > 0.01
    if adapter == "lora":
        model.unmerge_adapter()
    else:
        unmerge_rank_experts(model)
        assert torch.equal(logits(model, one_task), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, plain), logits(base(), plain), rtol=1e-4, atol=1e-5)
    unloaded = model.merge_and_unload(**({"task": "mnli"} if adapter == "task" else {}))
    torch.testing.assert_close(logits(unloaded, plain), expected, rtol=1e-4, atol=1e-4)


@EVERY_WAY
@pytest.mark.parametrize("gate", GATES)
def test_saving_exporting_and_reporting(gate, way, tmp_path):
    model = adapted(gate)
    randomise(model)
    more = {"token": {"calibration": [batch(gate)]}, "task": {"task": "rte"}, "dense": {}}[gate]

    def write(name):
        save_rank_experts(model, tmp_path / name / "saved")
        export_lora(model, tmp_path / name / "lora", **more)
        found = [load_file(tmp_path / name / kind / "adapter_model.safetensors") for kind in ("saved", "lora")]
        layers = [] if gate == "dense" else routing_report(model, [batch(gate)]).layers
        return found, [repr(layer) for layer in layers]

    whole, whole_layers = write("whole")
    WAYS[way](model, tmp_path / "offload")
    parts, layers = write("parts")
    assert layers == whole_layers
    for one, other in zip(whole, parts):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@EVERY_WAY
def test_the_balancing_bias_moves(way, tmp_path):
    """With `offload_buffers` the bias is on the meta device between forwards, where an addition does nothing."""
    whole, model = adapted("token"), adapted("token")
    WAYS[way](model, tmp_path / "offload")
    saved = []
    for number, one in enumerate((whole, model)):
        one.train()
        one(**batch("token"))
        update_router_bias(one)
        save_rank_experts(one, tmp_path / str(number))
        saved.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    moved = [name for name in saved[0] if name.endswith("balance_bias")]
    assert all(saved[0][name].any() for name in moved)
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in moved)


@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("gate", ["token", "dense"])
def test_the_experts_of_an_offloaded_mixture(gate, before, way, tmp_path):
    """They are slices of parameters that another module brings."""
    model, whole = models.mixtral(), models.mixtral()
    if before:
        WAYS[way](model, tmp_path / "offload")
    for one in (model, whole):
        torch.manual_seed(0)
        inject_rank_experts(one, expert_config(gate))
    if not before:
        WAYS[way](model, tmp_path / "offload")
    assert torch.equal(logits(model, batch(gate)), logits(whole, batch(gate)))
    if gate == "dense":
        for one in (model, whole):
            merge_rank_experts(one)
        assert torch.equal(logits(model, batch(gate)), logits(whole, batch(gate)))
        unmerge_rank_experts(model)
        unmerge_rank_experts(whole)
        assert torch.equal(logits(model, batch(gate)), logits(whole, batch(gate)))
    save_rank_experts(model, tmp_path / "parts")
    save_rank_experts(whole, tmp_path / "whole")
    parts, all_of_it = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], all_of_it[name]) for name in all_of_it)


def test_tensors_are_not_replaced_where_they_are_offloaded(tmp_path):
    model = inject_rank_experts(models.llama(), CONFIGS["token"]())
    WAYS["cpu"](model, tmp_path)
    with pytest.raises(ValueError, match="accelerate has offloaded the adapter's tensors"):
        prune_rank_experts(model, {path: torch.ones(16) for path, _ in adapted_layers(model)})
