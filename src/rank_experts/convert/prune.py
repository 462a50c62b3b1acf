"""Making an adapter smaller by the experts that nothing routes to, or the ranks that no task uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.checks import check_count, check_number
from ..config.config import RankExpertConfig
from ..files.layout import PREFIX
from ..files.state import adapter_config
from ..layers.adapter import RankExpertAdapter
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import check_in_place
from ..reports.recording import RoutingStatistics, record_routing
from .passes import Batches, check_batches, run_batches


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
    *,
    keep_experts: int | None = None,
    keep_load: float | None = None,
    adapter_name: str = "default",
    progress: bool = True,
) -> PruningReport:
    """Drop experts that carry no load, or the ranks above every task's own, in place.

    Token gate: experts are counted on `data`, and those that no token chose are dropped, which changes nothing for
    those tokens. Task gate: the ranks above the largest r_t are dropped, which changes nothing for any task; no data
    is needed. With `keep_experts` or `keep_load`, more than that is dropped, and the report says how much load that
    carried. The adapter has the same name and scale afterwards, a smaller r (a `rank_pattern` where layers differ), and
    saves, loads and trains on; an optimizer must be made anew.

    Args:
        model: With the adapter.
        data: A `DataLoader` or a list of batches; or what `record_routing` counted, or layer path to loads (E,).
            Where batches have labels, the loss is measured before and after.
        keep_experts: How many experts every layer keeps, at least top_k; for a task gate, how many of its first
            ranks, because there every rank is an expert. None: all that are used.
        keep_load: Token gate only, in place of `keep_experts`: the share of a layer's load, between 0 and 1, that the
            experts it keeps must carry. A layer keeps at least top_k of them.
        adapter_name: Which adapter.
        progress: Show progress bars.

    Returns:
        What was dropped and what it cost.

    Raises:
        ValueError: The adapter is dense, unknown or merged, data is missing or empty, loads do not fit, what to keep
            is out of range, or said twice. Nothing is pruned then.
        TypeError: `data`, `keep_experts` or `keep_load` is of another kind.

    Example:
        >>> print(prune_rank_experts(model, loader))  # doctest: +SKIP
    """
    config = adapter_config(model, adapter_name)
    layers = {path: layer for path, layer in adapted_layers(model) if adapter_name in layer.rank_experts}
    _check_what_to_keep(config, keep_experts, keep_load, adapter_name)
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{path} is merged. Call unmerge_rank_experts(model) before pruning.")
    check_in_place((path, layer.rank_experts) for path, layer in layers.items())
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
        adapter = layer.rank_experts[adapter_name]
        if config.router == "token":
            kept[path] = _used_experts(loads[path], adapter.settings.top_k, keep_experts, keep_load)
        else:
            kept[path] = _used_ranks(adapter, keep_experts)
    report = tuple(_describe(path, layers[path], adapter_name, kept[path], loads.get(path)) for path in layers)
    for path, layer in layers.items():
        _shrink(layer, adapter_name, kept[path])
    _rewrite_config(config, layers, adapter_name)
    loss_after = None
    if loss_before is not None and batches is not None:
        loss_after = run_batches(model, batches, "Loss after pruning", progress)
    return PruningReport(report, loss_before, loss_after)


def _check_what_to_keep(
    config: RankExpertConfig, keep_experts: int | None, keep_load: float | None, adapter_name: str
) -> None:
    if config.router not in ("token", "task"):
        raise ValueError(
            f"Adapter {adapter_name!r} is dense: all its ranks are always on, so none can be dropped. "
            "inject_lora splits an exported LoRA into ranks by weight."
        )
    if keep_experts is not None and keep_load is not None:
        raise ValueError(
            f"keep_experts={keep_experts!r} and keep_load={keep_load!r} both say what to keep: give one of them."
        )
    if keep_experts is not None:
        check_count("keep_experts", keep_experts)
        if config.router == "token" and keep_experts < config.top_k:
            raise ValueError(f"keep_experts={keep_experts}: expected at least {config.top_k} (top_k).")
    if keep_load is not None:
        if config.router == "task":
            raise ValueError(
                f"keep_load={keep_load!r}: adapter {adapter_name!r} routes by task, and its ranks carry no load of "
                "tokens. Give keep_experts, a number of ranks."
            )
        check_number("keep_load", keep_load, 1)
        if keep_load == 0:
            raise ValueError("keep_load=0: expected a share of the load between 0 and 1.")


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
    num_experts = layer.rank_experts[adapter_name].num_experts
    load = loads.get(path, loads.get(layer.path))
    if load is None:
        raise ValueError(
            f"{path} has no load: it saw no token that is not padding, or is not among the loads given "
            f"({sorted(loads)[:3]}…)."
        )
    load = torch.as_tensor(load).detach().double().cpu()
    if load.shape != (num_experts,) or not torch.isfinite(load).all() or load.min() < 0 or load.sum() == 0:
        raise ValueError(f"{path}: expected {num_experts} counts, one an expert, found {load.tolist()}.")
    return load


def _used_experts(load: Tensor, top_k: int, keep_experts: int | None, keep_load: float | None) -> Tensor:
    order = torch.sort(load, descending=True, stable=True).indices
    if keep_load is not None:
        share = load[order].cumsum(0) / load.sum()
        number = int((share < keep_load).sum()) + 1
    else:
        number = int((load > 0).sum()) if keep_experts is None else keep_experts
    return order[: max(number, top_k)].sort().values


@torch.no_grad()
def _used_ranks(adapter: RankExpertAdapter, keep_experts: int | None) -> Tensor:
    number = int(_chosen_ranks(adapter).max()) if keep_experts is None else keep_experts
    return torch.arange(min(number, adapter.settings.r))


def _chosen_ranks(adapter: RankExpertAdapter) -> Tensor:
    # (T,) r_t
    return adapter.task_gate().route(torch.arange(adapter.settings.num_tasks, device=adapter.A.device)).indices


@torch.no_grad()
def _describe(path: str, layer: RankExpertLinear, adapter_name: str, kept: Tensor, load: Tensor | None) -> LayerPruning:
    adapter = layer.rank_experts[adapter_name]
    if load is not None:
        return LayerPruning(path, len(kept), adapter.num_experts, float(1 - load[kept].sum() / load.sum()))
    ranks = _chosen_ranks(adapter).double().cpu()
    lost = (ranks - len(kept)).clamp(min=0).sum() / ranks.sum()
    return LayerPruning(path, len(kept), adapter.settings.r, float(lost))


@torch.no_grad()
def _shrink(layer: RankExpertLinear, adapter_name: str, kept: Tensor) -> None:
    adapter = layer.rank_experts[adapter_name]
    settings, A, B = adapter.settings, adapter.A, adapter.B
    kept = kept.to(A.device)
    if settings.router == "token":
        within = torch.arange(settings.expert_rank, device=A.device)
        ranks = (kept[:, None] * settings.expert_rank + within).reshape(-1)
        adapter.router_weight = _part(adapter.router_weight, kept)
        adapter.balance_bias = adapter.balance_bias[kept].clone()
        if (counted := layer.scope.take_load(layer.path, adapter_name)) is not None:
            layer.scope.loads[layer.path, adapter_name] = counted[kept.to(counted.device)]
        adapter.settings = settings._replace(r=len(ranks))
    else:
        ranks = kept
        # alpha / r stays, and so does (j / r)² where ranks are scaled by it.
        ratio = len(kept) / settings.r
        alpha = settings.alpha * (ratio**3 if settings.rank_scaling == "quadratic" else ratio)
        adapter.settings = settings._replace(r=len(ranks), alpha=alpha)
        adapter.gate_weight = _part(adapter.gate_weight, kept)
        adapter.gate_bias = _part(adapter.gate_bias, kept)
    adapter.A = _part(A, ranks)
    adapter.B = nn.Parameter(B[:, ranks].clone(), requires_grad=B.requires_grad)


def _part(parameter: nn.Parameter | Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad)


def _rewrite_config(config: RankExpertConfig, layers: dict[str, RankExpertLinear], adapter_name: str) -> None:
    ranks = {path.removeprefix(PREFIX): layer.rank_experts[adapter_name].settings.r for path, layer in layers.items()}
    alphas = {
        path.removeprefix(PREFIX): layer.rank_experts[adapter_name].settings.alpha for path, layer in layers.items()
    }
    config.r, config.rank_pattern = _pattern(ranks)
    config.alpha, config.alpha_pattern = _pattern(alphas)


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # The commonest value, and the layers that differ from it: anchored, so that no other path ends with one.
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": value for path, value in values.items() if value != common}
