"""The three gates as adapters of tiny models, and what such a model is called with."""

from __future__ import annotations

import torch
from peft import get_peft_model

import models
from helpers import CONFIGS, TASKS
from rank_experts import RankExpertConfig

GATES = ("token", "task", "dense")


def config(gate: str, **kwargs) -> RankExpertConfig:
    """A config of four ranks whose adapter changes the model's output from the start."""
    small = {"r": 4, "alpha": 16} | ({"top_k": 2} if gate == "token" else {})
    return CONFIGS[gate](**(small | kwargs))


def tasks(gate: str, size: int = 4) -> dict[str, torch.Tensor]:
    """The `task_ids` argument where the gate needs one: tasks 0, 1, 2, 0, …"""
    return {"task_ids": torch.arange(size) % len(TASKS)} if gate == "task" else {}


def batch(gate: str, name: str = "llama", **kwargs) -> dict[str, torch.Tensor]:
    """A batch for a tiny model, with `task_ids` where the gate needs them."""
    inputs = models.batch(name, **kwargs)
    return inputs | tasks(gate, len(next(iter(inputs.values()))))


def peft_model(gate: str, name: str = "llama", seed: int = 0, **kwargs):
    """A tiny model in a PeftModel with one adapter."""
    model = models.MODELS[name]()
    torch.manual_seed(seed)
    return get_peft_model(model, config(gate, **({"target_modules": models.TARGETS[name]} | kwargs)))


@torch.no_grad()
def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits in evaluation mode."""
    model.eval()
    return model(**inputs).logits


def randomise(model, adapter_name: str = "default", seed: int = 1) -> None:
    """Move every tensor of an adapter, its balancing bias included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if ".rank_experts." in name and f".{adapter_name}" in name and not tensor.is_meta:
                tensor.add_(torch.randn_like(tensor) * 0.3)
