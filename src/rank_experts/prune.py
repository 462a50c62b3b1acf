"""Making an adapter smaller by the experts that nothing routes to, or the ranks that no task uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import RankExpertConfig
from .files import adapter_config
from .layer import RankExpertLinear
from .layout import PREFIX
from .model import adapted_layers
from .passes import Batches, check_batches, run_batches
from .recording import RoutingStatistics, record_routing
from .routing import TaskRouter, TokenRouter


@dataclass(frozen=True)
class LayerPruning:
    """What pruning left of one layer.

    Attributes:
        path: The layer.
        kept: Experts (token gate) or ranks (task gate) that are left.
        of: How many there were.
        load_dropped: Share of the routing choices, or of the tasks' ranks, that fell on what was dropped; 0: exact.
    """

    path: str
    kept: int
    of: int
    load_dropped: float


@dataclass(frozen=True)
class PruningReport:
    """What pruning did, layer by layer, and what it cost.

    Attributes:
        layers: In the model's order.
        loss_before: The model's mean loss on the given batches; None without batches or labels.
        loss_after: The same with the smaller adapter.
    """

    layers: tuple[LayerPruning, ...]
    loss_before: float | None
    loss_after: float | None

    @property
    def exact(self) -> bool:
        """Nothing that was dropped was ever used: by any task, or by any of the tokens that were counted."""
        return all(layer.load_dropped == 0 for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.path) for layer in self.layers)
        lines = [
            f"{layer.path:<{width}}  {layer.kept:>4} of {layer.of:<4}  {layer.load_dropped:>6.2%} of the load dropped"
            for layer in self.layers
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss: {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        return "\n".join(lines)


def prune_rank_experts(
    model: nn.Module,
    data: Batches | RoutingStatistics | Mapping[str, Tensor] | None = None,
    keep: int | float | None = None,
    *,
    adapter_name: str = "default",
    progress: bool = True,
) -> PruningReport:
    """Drop experts that carry no load, or the ranks above every task's own, in place.

    Token gate: experts are counted on `data`, and those that no token chose are dropped, which changes nothing for
    those tokens. Task gate: the ranks above the largest r_t are dropped, which changes nothing for any task; no data
    is needed. With `keep`, more than that is dropped, and the report says how much load that carried. The adapter
    has the same name and scale afterwards, a smaller r (a `rank_pattern` where layers differ), and saves, loads and
    trains on; an optimizer must be made anew.

    Args:
        model: With the adapter.
        data: A `DataLoader` or a list of batches; or what `record_routing` counted, or layer path to loads (E,).
            Where batches have labels, the loss is measured before and after.
        keep: How many experts (token gate) or ranks (task gate) every layer keeps, a whole number; or, for a token
            gate, the share of the load that they must carry, a number between 0 and 1. None: all that are used. A
            layer keeps at least top_k experts.
        adapter_name: Which adapter.
        progress: Show progress bars.

    Returns:
        What was dropped and what it cost.

    Raises:
        ValueError: The adapter is dense, unknown or merged, data is missing or empty, loads do not fit, or keep is
            out of range. Nothing is pruned then.
        TypeError: `data` or `keep` is of another kind.

    Example:
        >>> print(prune_rank_experts(model, loader))  # doctest: +SKIP
    """
    config = adapter_config(model, adapter_name)
    layers = {path: layer for path, layer in adapted_layers(model) if adapter_name in layer.rank_expert_A}
    _check_keep(config, keep, adapter_name)
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{path} is merged. Call unmerge_rank_experts(model) before pruning.")
    batches = None if data is None or isinstance(data, (Mapping, RoutingStatistics)) else data
    if batches is not None:
        check_batches(batches, "data")
    loads: dict[str, Tensor] = {}
    loss_before = None
    if config.router == "token":
        if data is None:
            raise ValueError(
                f"Adapter {adapter_name!r} routes by token: which experts carry load shows on data. Give batches, or "
                "loads (layer path to a count an expert)."
            )
        loads, loss_before = _count(model, layers, data, adapter_name, progress)
    elif batches is not None:
        loss_before = run_batches(model, batches, "Loss before pruning", progress)
    kept = {}
    for path, layer in layers.items():
        router = layer._router(adapter_name)
        if isinstance(router, TokenRouter):
            kept[path] = _used_experts(loads[path], router.top_k, keep)
        else:
            assert isinstance(router, TaskRouter)
            kept[path] = _used_ranks(router, keep)
    report = tuple(_describe(path, layers[path], adapter_name, kept[path], loads.get(path)) for path in layers)
    for path, layer in layers.items():
        _shrink(layer, adapter_name, kept[path])
    _rewrite_config(config, layers, adapter_name)
    loss_after = None
    if loss_before is not None and batches is not None:
        loss_after = run_batches(model, batches, "Loss after pruning", progress)
    return PruningReport(report, loss_before, loss_after)


def _check_keep(config: RankExpertConfig, keep: int | float | None, adapter_name: str) -> None:
    if config.router == "dense":
        raise ValueError(
            f"Adapter {adapter_name!r} is dense: all its ranks are always on, so none can be dropped. "
            "from_lora splits an exported LoRA into ranks by weight."
        )
    if keep is None:
        return
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep={keep!r}: expected a whole number of experts, or a share of the load in (0, 1).")
    if isinstance(keep, float) and (config.router == "task" or not 0 < keep < 1):
        expected = "a whole number of ranks" if config.router == "task" else "a share of the load in (0, 1)"
        raise ValueError(f"keep={keep}: expected {expected}.")
    least = config.top_k if config.router == "token" else 1
    if isinstance(keep, int) and keep < least:
        raise ValueError(f"keep={keep}: expected at least {least}{' (top_k)' if config.router == 'token' else ''}.")


def _count(
    model: nn.Module,
    layers: dict[str, RankExpertLinear],
    data: Batches | RoutingStatistics | Mapping[str, Tensor],
    adapter_name: str,
    progress: bool,
) -> tuple[dict[str, Tensor], float | None]:
    loss = None
    if isinstance(data, Mapping):
        known = dict(data)
    else:
        if not isinstance(data, RoutingStatistics):
            with record_routing(model) as recorded:
                loss = run_batches(model, data, "Counting load", progress)
            data = recorded
        known = {one.path: one.load for one in data.layers(adapter_name) if one.load is not None}
    return {path: _load_of(path, layer, known, adapter_name) for path, layer in layers.items()}, loss


def _load_of(path: str, layer: RankExpertLinear, loads: Mapping[str, Tensor], adapter_name: str) -> Tensor:
    router = layer._router(adapter_name)
    assert isinstance(router, TokenRouter)
    load = loads.get(path, loads.get(layer.path))
    if load is None:
        raise ValueError(
            f"{path} has no load: it saw no token that is not padding, or is not among the loads given "
            f"({sorted(loads)[:3]}…)."
        )
    load = torch.as_tensor(load).detach().double().cpu()
    if load.shape != (router.num_experts,) or not torch.isfinite(load).all() or load.min() < 0 or load.sum() == 0:
        raise ValueError(f"{path}: expected {router.num_experts} counts, one an expert, found {load.tolist()}.")
    return load


def _used_experts(load: Tensor, top_k: int, keep: int | float | None) -> Tensor:
    order = torch.sort(load, descending=True, stable=True).indices
    if keep is None:
        number = int((load > 0).sum())
    elif isinstance(keep, float):
        share = load[order].cumsum(0) / load.sum()
        number = int((share < keep).sum()) + 1
    else:
        number = keep
    return order[: max(number, top_k)].sort().values


@torch.no_grad()
def _used_ranks(router: TaskRouter, keep: int | float | None) -> Tensor:
    return torch.arange(int(_chosen_ranks(router).max()) if keep is None else min(int(keep), router.r))


def _chosen_ranks(router: TaskRouter) -> Tensor:
    # (T,) r_t
    return router(torch.arange(router.num_tasks, device=router.gate_weight.device)).indices


@torch.no_grad()
def _describe(path: str, layer: RankExpertLinear, adapter_name: str, kept: Tensor, load: Tensor | None) -> LayerPruning:
    router = layer._router(adapter_name)
    if isinstance(router, TokenRouter) and load is not None:
        return LayerPruning(path, len(kept), router.num_experts, float(1 - load[kept].sum() / load.sum()))
    assert isinstance(router, TaskRouter)
    ranks = _chosen_ranks(router).double().cpu()
    lost = (ranks - len(kept)).clamp(min=0).sum() / ranks.sum()
    return LayerPruning(path, len(kept), router.r, float(lost))


@torch.no_grad()
def _shrink(layer: RankExpertLinear, adapter_name: str, kept: Tensor) -> None:
    router = layer._router(adapter_name)
    A, B = layer.rank_expert_A[adapter_name], layer.rank_expert_B[adapter_name]
    kept = kept.to(A.device)
    if isinstance(router, TokenRouter):
        ranks = (kept[:, None] * router.expert_rank + torch.arange(router.expert_rank, device=A.device)).reshape(-1)
        router.weight = _part(router.weight, kept)
        router.balance_bias = router.balance_bias[kept].clone()
        if adapter_name in layer._loads:
            layer._loads[adapter_name] = layer._loads[adapter_name][kept].clone()
    else:
        assert isinstance(router, TaskRouter)
        ranks = kept
        # alpha / r stays, and so does (j / r)² where ranks are scaled by it.
        ratio = len(kept) / router.r
        alpha = layer.settings[adapter_name].alpha * (ratio**3 if router.rank_scaling == "rank" else ratio)
        layer.settings[adapter_name] = layer.settings[adapter_name]._replace(alpha=alpha)
        router.gate_weight = _part(router.gate_weight, kept)
        router.gate_bias = _part(router.gate_bias, kept)
    layer.rank_expert_A[adapter_name] = _part(A, ranks)
    layer.rank_expert_B[adapter_name] = nn.Parameter(B[:, ranks].clone(), requires_grad=B.requires_grad)


def _part(parameter: nn.Parameter | Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad)


def _rewrite_config(config: RankExpertConfig, layers: dict[str, RankExpertLinear], adapter_name: str) -> None:
    ranks = {path.removeprefix(PREFIX): layer.rank_expert_A[adapter_name].shape[0] for path, layer in layers.items()}
    alphas = {path.removeprefix(PREFIX): layer.settings[adapter_name].alpha for path, layer in layers.items()}
    config.r, config.rank_pattern = _pattern(ranks)
    config.alpha, config.alpha_pattern = _pattern(alphas)


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # The commonest value, and the layers that differ from it: anchored, so that no other path ends with one.
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": value for path, value in values.items() if value != common}
