"""The adapters that the demo compares: their settings, and how each is attached, counted, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.layers import adapted_layers

from .tasks import TASKS


class Method(NamedTuple):
    """An adapter's settings and the learning rate that suits it."""

    config: PeftConfig
    learning_rate: float

    @property
    def routed(self) -> bool:
        """Whether it is one of ours, which take `task_ids`."""
        return isinstance(self.config, RankExpertConfig)


def methods() -> dict[str, Method]:
    """Return the demo's methods by name; new configs each time, because PEFT writes into them."""
    # The papers' values, with a tenth of MoRE's contrastive loss (docs/choose.md).
    more = RankExpertConfig.more(
        tasks=list(TASKS), r=8, alpha=32, rank_scaling="linear", contrastive_coef=0.01, target_modules="all-linear"
    )
    smora = RankExpertConfig.smora(r=64, top_k=8, alpha=16, target_modules="all-linear")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return {"LoRA": Method(lora, 1e-3), "SMoRA": Method(smora, 1e-3), "MoRE": Method(more, 1e-3)}


def attach(encoder: PreTrainedModel, method: Method) -> nn.Module:
    """Give an encoder a new adapter: ours in place, PEFT's LoRA in PEFT's wrapper."""
    if isinstance(method.config, RankExpertConfig):
        return inject_rank_experts(encoder, method.config)
    return get_peft_model(encoder, method.config)


def save(encoder: nn.Module, folder: Path) -> None:
    """Save the adapter of an encoder."""
    if isinstance(encoder, PeftModel):
        encoder.save_pretrained(str(folder))
    else:
        save_rank_experts(encoder, folder)


def load(encoder: PreTrainedModel, folder: Path, method: Method) -> nn.Module:
    """Load an adapter that `save` wrote into a fresh encoder."""
    if method.routed:
        return load_rank_experts(encoder, folder)
    return PeftModel.from_pretrained(encoder, folder)


def trainable_parameters(encoder: nn.Module) -> int:
    """Count the adapter's parameters."""
    return sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)


@torch.no_grad()
def active_parameters(encoder: nn.Module) -> int:
    """Count the adapter parameters that a token's forward multiplies with, routers included, over all layers.

    All of a LoRA's; of a token-routed layer the chosen ranks and the router; of a task-routed layer the task's first
    r_t ranks, in the mean over the tasks (its gate is the same for every token of a task and is not counted).
    """
    if isinstance(encoder, PeftModel):
        return trainable_parameters(encoder)
    active = 0.0
    for _, layer in adapted_layers(encoder):
        a_rank = layer.in_features + layer.out_features
        adapter = layer.rank_experts["default"]
        if adapter.settings.router == "token":
            active += adapter.settings.top_k * adapter.settings.expert_rank * a_rank + adapter.router_weight.numel()
        elif adapter.settings.router == "task":
            chosen = adapter.task_gate().route(torch.arange(adapter.settings.num_tasks)).indices
            active += chosen.float().mean().item() * a_rank
    return round(active)
