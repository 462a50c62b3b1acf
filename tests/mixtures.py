"""Tiny mixture-of-experts bases, and adapters on their experts."""

from __future__ import annotations

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import models
from gates import config
from rank_experts import inject_rank_experts
from rank_experts.layers.experts import RankExpertExperts

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


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


def gpt_oss():
    """Its experts' weights are transposed and have biases, and gate and up interleave."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=models.VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj_bias"):
                parameter.normal_()
    return model


BASES = {"mixtral": models.mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def expert_config(gate: str, **kwargs):
    """A config of `gates.config` for the experts alone."""
    return config(gate, **(dict(target_modules=[], target_parameters=EXPERTS) | kwargs))


def adapted(gate: str, make=models.mixtral, seed: int = 0, **kwargs):
    """A tiny mixture with adapters on its experts."""
    model = make()
    torch.manual_seed(seed)
    return inject_rank_experts(model, expert_config(gate, **kwargs))


def the_experts(model) -> dict[str, RankExpertExperts]:
    """The adapted modules of experts, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RankExpertExperts)}
