"""Adapters on bases quantised with bitsandbytes and torchao, on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM

import models
from gates import GATES, batch, config, logits
from helpers import TASKS
from rank_experts import (
    inject_rank_experts,
    load_rank_experts,
    merge_rank_experts,
    save_rank_experts,
    unmerge_rank_experts,
)
from rank_experts.layers import adapted_layers
from rank_experts.layers.base_weight import keep_weight, quantisation, read_weight, restore_weight, write_weight

EVERY = pytest.mark.parametrize("gate", GATES)
# bitsandbytes packs blocks of 64 weights.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    models.llama(**SIZES).save_pretrained(path)
    return path


def int8(folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, dtype=torch.float32)


def nf4(folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, dtype=torch.float32)


def torchao(folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_(
        model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
    )
    return model


BASES = {"bitsandbytes 8-bit": int8, "bitsandbytes 4-bit": nf4, "torchao": torchao}


@pytest.fixture(params=BASES)
def kind(request):
    return request.param


@EVERY
def test_forward_train_save_load(gate, kind, folder, tmp_path):
    base = BASES[kind](folder)
    plain = logits(base, models.batch("llama"))
    model = get_peft_model(prepare_model_for_kbit_training(base), config(gate, init_weights=True))
    assert {quantisation(layer.base_layer) for _, layer in adapted_layers(model)} == {kind}
    torch.testing.assert_close(logits(model, batch(gate)), plain, rtol=0, atol=0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch(gate)).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        if name in frozen and type(p) is nn.Parameter:
            assert torch.equal(p, frozen[name]), name
    model.save_pretrained(tmp_path / "peft")
    save_rank_experts(model, tmp_path / "ours")
    trained = logits(model, batch(gate))
    assert (trained - plain).abs().max() > 1e-3
    for loaded in (
        PeftModel.from_pretrained(BASES[kind](folder), tmp_path / "ours"),
        load_rank_experts(BASES[kind](folder), tmp_path / "peft"),
    ):
        # bitsandbytes' 4-bit kernel for the CPU rounds otherwise where a layer was first called in training.
        limit = 0.05 if kind == "bitsandbytes 4-bit" else 1e-5
        assert (logits(loaded, batch(gate)) - trained).norm() < limit * trained.norm()


@EVERY
def test_merge_and_unmerge(gate, kind, folder):
    model = inject_rank_experts(BASES[kind](folder), config(gate))
    inputs = batch(gate)
    if gate == "token":
        with pytest.raises(ValueError, match="routes by token"):
            merge_rank_experts(model)
        return
    task = TASKS[1] if gate == "task" else None
    if task:
        inputs["task_ids"] = torch.ones(4, dtype=torch.int64)
    before = logits(model, inputs)
    with model_off(model):
        plain = logits(model, inputs)
    warned = pytest.warns(UserWarning, match=f"quantised with {kind}")
    with warned:
        from rank_experts.messages import warn_once

        warn_once.cache_clear()
        merge_rank_experts(model, task=task, safe_merge=True)
    merged = logits(model, inputs)
    # Rounding the sum again costs something; torchao's stays in floating point.
    lost = (merged - before).norm() / (before - plain).norm()
    assert lost < {"bitsandbytes 8-bit": 0.2, "bitsandbytes 4-bit": 0.5, "torchao": 1e-4}[kind]
    unmerge_rank_experts(model)
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=0)


class model_off:
    """Adapters off within the block."""

    def __init__(self, model):
        self.layers = [layer for _, layer in adapted_layers(model)]

    def __enter__(self):
        for layer in self.layers:
            layer.enable_adapters(False)

    def __exit__(self, *exc_info):
        for layer in self.layers:
            layer.enable_adapters(True)


def test_merge_and_unload_leaves_a_model_that_runs(kind, folder):
    model = get_peft_model(BASES[kind](folder), config("dense"))
    logits(model, models.batch("llama"))  # a forward may reorder a quantised weight
    sums = {
        path: read_weight(layer.base_layer, path) + layer.rank_experts["default"].delta()
        for path, layer in adapted_layers(model.get_base_model())
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert not list(adapted_layers(merged))
    assert torch.isfinite(logits(merged, models.batch("llama"))).all()
    limit = {"bitsandbytes 8-bit": 0.02, "bitsandbytes 4-bit": 0.12, "torchao": 1e-6}[kind]
    for path, expected in sums.items():
        got = read_weight(merged.get_submodule(path), path)
        assert (got - expected).norm() < limit * expected.norm(), path


class Packed(nn.Module):
    """A layer of a library that is not known here: in_features, out_features, a plain forward, no weight to read."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.qweight = nn.Parameter(inner.weight.detach().half(), requires_grad=False)

    def forward(self, x):
        return x @ self.qweight.float().T


@EVERY
def test_other_layers_work_through_their_forward_and_refuse_merging_by_name(gate):
    base = models.llama()
    for block in base.model.layers:
        block.self_attn.q_proj = Packed(block.self_attn.q_proj)
    plain = logits(base, models.batch("llama"))
    model = inject_rank_experts(base, config(gate, target_modules=["q_proj"]))
    assert (logits(model, batch(gate)) - plain).abs().max() > 1e-3
    model.train()
    model(**batch(gate)).loss.backward()
    message = "routes by token" if gate == "token" else r"q_proj is a test_quantised\.Packed.*cannot dequantise"
    with pytest.raises((TypeError, ValueError), match=message):
        merge_rank_experts(model, task=TASKS[0] if gate == "task" else None)
    assert not any(layer.merged for _, layer in adapted_layers(model))


def test_eight_bit_floats_with_scales_beside_them_are_not_merged_into():
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert quantisation(layer) == "Linear"


@pytest.mark.parametrize("module", [nn.Conv2d(3, 3, 1), nn.Bilinear(4, 4, 4), nn.MultiheadAttention(8, 2)])
def test_layers_that_are_not_linear_are_refused_by_name(module):
    model = nn.Sequential(module)
    with pytest.raises(TypeError, match=f"0 is a {type(module).__name__}"):
        inject_rank_experts(model, config("dense", target_modules=["0"]))


def test_a_merged_weight_is_read_as_it_is_before_any_forward(folder):
    layer = int8(folder).model.layers[0].self_attn.q_proj
    layer(torch.ones(1, 64))
    new = torch.randn(64, 64) * 5
    write_weight(layer, new)
    assert (read_weight(layer, "q_proj") - new).abs().max() < 0.1
    kept = keep_weight(layer)
    write_weight(layer, new / 7)
    assert (read_weight(layer, "q_proj") - new / 7).abs().max() < 0.02
    restore_weight(layer, kept)
    assert (read_weight(layer, "q_proj") - new).abs().max() < 0.1
