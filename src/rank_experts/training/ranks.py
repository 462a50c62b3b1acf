"""Which ranks a task router has come to use, for the logs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..layers.linear import adapted_layers


def chosen_ranks(model: nn.Module) -> dict[str, float]:
    """Return the rank r_t that every task of a task-routed adapter uses, averaged over layers, as "rank_<task>".

    Empty where FSDP2 or ZeRO-3 keeps each process a part of the gates between forwards.
    """
    ranks: dict[str, list[Tensor]] = {}
    for _, layer in adapted_layers(model):
        for name, adapter in layer.rank_experts.items():
            if adapter.settings.router == "task" and not _is_partitioned(adapter):
                ids = torch.arange(adapter.settings.num_tasks, device=adapter.gate_weight.device)
                with torch.no_grad():
                    chosen = adapter.task_gate().route(ids).indices
                for task, rank in zip(layer.scope.tasks[name], chosen, strict=True):
                    ranks.setdefault(f"rank_{task}", []).append(rank)
    return {name: round(float(torch.stack(values).float().mean()), 3) for name, values in ranks.items()}


def _is_partitioned(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())
