"""Adapters on a mixture's experts: which of them a config names, and what is refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch

import models
from gates import GATES, batch, config, logits, randomise
from helpers import assert_unchanged, fingerprint
from mixtures import BASES, EXPERTS, adapted, expert_config, the_experts
from rank_experts import (
    export_lora,
    export_loras,
    inject_rank_experts,
    load_rank_experts,
    prune_rank_experts,
    save_rank_experts,
)
from rank_experts.layers import adapted_layers


@pytest.fixture(params=BASES)
def make(request):
    return BASES[request.param]


def test_the_config_says_where():
    one = adapted("dense", layers_to_transform=[1], layers_pattern="layers")
    assert the_experts(one).keys() == {"model.layers.1.mlp.experts"}
    one = adapted("dense", exclude_modules=["layers.0.mlp.experts"])
    assert the_experts(one).keys() == {"model.layers.1.mlp.experts"}
    one = adapted("dense", exclude_modules=["down_proj"])
    assert {path.split(".")[5] for path, _ in adapted_layers(one)} == {"gate_up_proj"}
    one = adapted("dense", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    assert {path.split(".")[4] for path, _ in adapted_layers(one)} == {"q_proj", "experts"}
    patterns = {"layers.1.mlp.experts.down_proj": 2, "experts.down_proj.3": 6}
    one = adapted("dense", rank_pattern=patterns, alpha_pattern={"experts.gate_up_proj": 8})
    layers = dict(adapted_layers(one))
    ranks = {path: len(layer.rank_experts["default"].A) for path, layer in layers.items()}
    assert ranks["model.layers.1.mlp.experts.down_proj.0"] == 2
    assert ranks["model.layers.0.mlp.experts.down_proj.3"] == 6
    assert ranks["model.layers.0.mlp.experts.gate_up_proj.0"] == 4
    assert layers["model.layers.0.mlp.experts.gate_up_proj.0"].rank_experts["default"].settings.alpha == 8


def test_patterns_that_match_nothing_are_warned_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patterns = {"rank_pattern": {"experts.down_proj": 2, "experts.w2": 4}, "alpha_pattern": {"down_proj.1": 3}}
        adapted("dense", exclude_modules=["layers.0.mlp.experts"], **patterns)
    said = [str(one.message) for one in caught if "pattern" in str(one.message) or "exclude" in str(one.message)]
    assert said == ["rank_pattern: ['experts.w2'] name no layer and no parameter that the adapter targets."]


def test_pruning(tmp_path):
    model = adapted("token", r=8)
    randomise(model)
    data = [batch("token")]
    expected = logits(model, data[0])
    report = prune_rank_experts(model, data, progress=False)
    assert report.exact
    assert len(report.layers) == 16
    assert any(layer.kept < layer.of for layer in report.layers)
    torch.testing.assert_close(logits(model, data[0]), expected, rtol=1e-5, atol=1e-5)
    save_rank_experts(model, tmp_path)
    assert torch.equal(logits(load_rank_experts(models.mixtral(), tmp_path), data[0]), logits(model, data[0]))


def test_export_is_refused():
    model = adapted("dense").eval()
    with pytest.raises(RuntimeError, match=r"mlp\.experts: adapted experts of a mixture cannot be exported.*Merge"):
        torch.export.export(model, (), {"input_ids": batch("dense")["input_ids"]}, strict=False)


@pytest.mark.parametrize("gate", GATES)
def test_lora_export_is_refused(gate, tmp_path):
    model = adapted(gate)
    task = "rte" if gate == "task" else None
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.0.*one of a mixture's experts.*plain LoRA"):
        export_lora(model, tmp_path / "lora", task=task, calibration=[batch(gate)] if gate == "token" else None)
    if gate == "task":
        with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.0.*one of a mixture's experts.*plain LoRA"):
            export_loras(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("target", [["experts"], r".*\.experts"])
def test_experts_as_a_target_module_are_refused_by_name(make, target):
    model = make()
    before = fingerprint(model)
    message = r"mlp\.experts is a \w+Experts.*3-D parameters.*target_parameters=\['experts\.gate_up_proj', .*down"
    with pytest.raises(TypeError, match=message):
        inject_rank_experts(model, config("dense", target_modules=target))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(target_parameters=["experts.w1"]), ValueError, r"matches target_parameters=\['experts.w1'\].*gate_up"),
        (dict(target_parameters=["gate.weight"]), TypeError, r"mlp\.gate\.weight is a parameter of shape \(4, 32\)"),
        (dict(target_parameters=["q_proj.weight"]), TypeError, r"q_proj\.weight is a parameter.*target_modules"),
        (dict(target_parameters=EXPERTS, layers_to_transform=[7]), ValueError, "No parameter of Mixtral"),
        (dict(target_parameters="experts.down_proj"), TypeError, "target_parameters='experts.down_proj': expected a"),
        (dict(target_parameters=EXPERTS, r=4, top_k=5), ValueError, "top_k=5"),
        (dict(target_parameters=EXPERTS, rank_pattern={"down_proj": 1}), ValueError, r"down_proj\.0: top_k=2"),
    ],
)
def test_what_cannot_be_adapted_is_refused(fields, error, message):
    model = models.mixtral()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        inject_rank_experts(model, config("token", **(dict(target_modules=[]) | fields)))
    assert_unchanged(model, before)


def test_experts_that_cannot_be_adapted_are_refused():
    model = BASES["gpt_oss"]()
    with pytest.raises(ValueError, match=r"mlp\.experts has a bias for each expert.*bias='all'"):
        inject_rank_experts(model, expert_config("dense", bias="all"))
    model = models.mixtral()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"mlp\.experts\.down_proj holds torch.float8_e4m3fn: quantised experts"):
        inject_rank_experts(model, expert_config("dense"))
    model = models.mixtral()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts holds a part of the experts only"):
        inject_rank_experts(model, expert_config("dense"))


def test_the_old_names_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"No module of MixtralForCausalLM matches.*w1"):
        inject_rank_experts(models.mixtral(), config("dense", target_modules=["w1", "w2", "w3"]))
