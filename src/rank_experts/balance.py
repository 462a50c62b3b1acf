"""Loss-free load balancing (arXiv 2408.15664): the bias that moves once per optimiser step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .model import adapted_layers, routing_scopes
from .routing import TokenRouter


@torch.no_grad()
def update_router_bias(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Move every balancing bias by one step: b += rate · sign(mean(load) − load). Call it after `optimizer.step()`.

    The load is what all training forwards since the last call counted, padding left out, added up over data-parallel
    ranks. All ranks must call it, with the same adapters. A model without token routers, or whose load_balance is not
    "bias", is left alone, and so is a bias without any load.

    Args:
        model: With adapters; wrapped in DistributedDataParallel, FSDP or `PeftModel` or not.

    Returns:
        (layer's path, adapter) to the load (E,) that the step saw, for logs.

    Example:
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     update_router_bias(model)
        ...     optimizer.zero_grad()
    """
    routers = [
        (path, layer, name, router)
        for path, layer in adapted_layers(model)
        for name, router in layer.rank_expert_router.items()
        if isinstance(router, TokenRouter) and layer.settings[name].load_balance == "bias"
    ]
    if not routers:
        return {}
    device = routers[0][3].balance_bias.device
    loads = torch.cat([layer.take_load(name).to(device) for _, layer, name, _ in routers])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loads)
    counts = {}
    for (path, layer, name, router), load in zip(
        routers, loads.split([router.num_experts for *_, router in routers]), strict=True
    ):
        counts[path, name] = load
        rate = layer.settings[name].balance_rate
        router.balance_bias += rate * torch.sign(load.mean() - load).to(router.balance_bias.device)
    for scope in routing_scopes(model):
        scope.silent_calls = 0
    return counts
