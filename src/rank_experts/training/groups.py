"""An optimiser's groups by role: experts, routers and heads may have learning rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.linear import adapted_layers
from .heads import MultiTaskClassifier


def roles(model: nn.Module) -> dict[int, str]:
    """Return id(parameter) to \"router\" or \"head\"; whatever is not listed counts as an expert's."""
    found = {
        id(parameter): "router"
        for _, layer in adapted_layers(model)
        for adapter in layer.rank_experts.values()
        for parameter in adapter.gate_parameters()
    }
    for module in model.modules():
        if isinstance(module, MultiTaskClassifier):
            found |= {id(parameter): "head" for parameter in module.heads.parameters()}
    return found


def split_groups(
    groups: list[dict[str, Any]], roles: dict[int, str], rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Return the groups, each split by role, with the roles' rates; experts first, whose rate `Trainer` logs."""
    split = []
    for role in ("expert", "router", "head"):
        for group in groups:
            own = [p for p in group["params"] if roles.get(id(p), "expert") == role]
            if own:
                rate = rates.get(role)
                split.append({**group, "params": own} | ({} if rate is None else {"lr": rate}))
    return split
