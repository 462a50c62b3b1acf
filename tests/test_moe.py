"""Mixture-of-experts bases: their linear layers are adapted, their 3-D expert parameters refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import models
import rank_experts._warnings
from gates import GATES, batch, config, logits
from rank_experts import inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.model import adapted_layers


def qwen3_moe():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=models.VOCAB,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=2,
            pad_token_id=0,
        )
    )


BASES = {"mixtral": models.mixtral, "qwen3_moe": qwen3_moe}


@pytest.fixture(params=BASES)
def make(request):
    return BASES[request.param]


@pytest.mark.parametrize("gate", GATES)
def test_the_linear_layers_of_a_mixture(make, gate, tmp_path):
    rank_experts._warnings.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r'all-linear" leaves out the \d mixtures of experts.*mlp\.experts.*3-D'):
        model = inject_rank_experts(make(), config(gate))
    paths = [path for path, _ in adapted_layers(model)]
    assert len([path for path in paths if "self_attn" in path]) == 8
    assert not any("experts" in path for path in paths)
    base = make()
    assert (logits(model, batch(gate)) - logits(base, models.batch("llama"))).abs().max() > 1e-3
    model.train()
    # The base's own balancing loss comes beside ours.
    outputs = model(**batch(gate), output_router_logits=True)
    outputs.loss.backward()
    assert outputs.aux_loss is not None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_rank_experts(model, tmp_path)
    loaded = load_rank_experts(make(), tmp_path)
    assert torch.equal(logits(loaded, batch(gate)), logits(model, batch(gate)))


@pytest.mark.parametrize("target", [["experts"], r".*\.experts"])
def test_experts_as_a_target_are_refused_by_name(make, target):
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(
        TypeError, match=r"mlp\.experts is a \w+Experts.*3-D parameters.*gate_up_proj.*target_parameters"
    ):
        inject_rank_experts(model, config("dense", target_modules=target))
    assert [name for name, _ in model.named_modules()] == before


def test_the_old_names_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"No module of MixtralForCausalLM matches.*w1"):
        inject_rank_experts(models.mixtral(), config("dense", target_modules=["w1", "w2", "w3"]))
