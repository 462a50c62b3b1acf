"""The models that the step and decoding benchmarks adapt: random weights, the shapes of Llama and T5."""

from __future__ import annotations

import copy
import tempfile

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.layers import adapted_layers
from variants import TASKS, PublishedSMoRA, choose_ranks

VARIANTS = ["base", "lora64", "lora8", "smora", "smora native", "more8", "more8 native", "xlora", "published"]
"""X-LoRA: eight LoRA of rank 8, all trained, and PEFT's classifier, which reads a pass of the model of its own."""


def base_model(shape: str, hidden: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """A Llama-shaped ("llama") or T5-shaped ("t5") model, frozen."""
    torch.manual_seed(0)
    if shape == "llama":
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            pad_token_id=0,
        )
        model: nn.Module = LlamaForCausalLM(config)
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=1024,
                d_model=hidden,
                d_kv=64,
                d_ff=hidden * 4,
                num_layers=layers,
                num_heads=hidden // 64,
                decoder_start_token_id=0,
                pad_token_id=0,
                dropout_rate=0.0,
            )
        )
    return model.to(dtype).requires_grad_(False)


def adapt(model: nn.Module, variant: str) -> nn.Module:
    """Put a variant's adapters on every linear layer; see `VARIANTS`."""
    if variant == "base":
        return model
    if variant.startswith("lora"):
        r = int(variant.removeprefix("lora"))
        config = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    if variant == "xlora":
        return _xlora(model)
    common = dict(target_modules="all-linear", init_weights=False)
    more = {"tasks": TASKS, "alpha": 16, "rank_scaling": "none", "contrastive_coef": 0.01}
    ours = RankExpertConfig.more(**more, **common) if "more8" in variant else RankExpertConfig.smora(alpha=4, **common)
    inject_rank_experts(model, ours, autocast_adapter_dtype=False)
    for path, layer in list(adapted_layers(model)):
        if "more8" in variant:
            choose_ranks(layer.rank_experts["default"], [2, 5, 8])
        elif variant == "published":
            model.set_submodule(path, PublishedSMoRA(layer))
    return model


def _xlora(model: nn.Module) -> nn.Module:
    # PEFT reads its experts from folders.
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        one = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
        one.save_pretrained(folder)
        experts = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters={str(i): folder for i in range(8)},
            use_trainable_adapters=True,
        )
        adapted = get_peft_model(model, experts, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name or "internal_xlora_classifier" in name)
    return adapted
