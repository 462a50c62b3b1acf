"""Several adapters made into one: PEFT's `add_weighted_adapter`, for what is static.

    "cat":     A = [w_i s_i A_i],             B = [B_i diag(g_i)]       exact, with the ranks of all
    "linear":  A = Σ ± √(|w_i| s_i) A_i,      B = Σ √(|w_i| s_i) B_i diag(g_i)

as PEFT computes them for LoRA; g_i is 1 for a dense adapter, and a task gate's for the task that is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..config.config import RankExpertConfig
from ..layers.adapter import RankExpertAdapter
from ..layers.experts import ExpertProjection
from ..layers.linear import RankExpertLinear
from ..layers.offloading import onloaded
from ..messages import nearest

SUPPORTED = ("linear", "cat")


def combined_factors(
    layers: dict[str, RankExpertLinear], adapters: Sequence[str], weights: Sequence[float], kind: str, task: str | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer path to A (r, d_in) and B (d_out, r) of the adapter that is made; see the formulas above.

    Args:
        layers: Layer path to the adapted layer.
        adapters: Names of the adapters.
        weights: One for each.
        kind: "linear" or "cat".
        task: Whose gate, for adapters that route by task.

    Raises:
        ValueError: "linear" meets different ranks in a layer.
    """
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        parts = [
            _part(layer.rank_experts[name], weight, kind, _task_id(layer, name, task))
            for name, weight in zip(adapters, weights, strict=True)
            if name in layer.rank_experts
        ]
        if not parts:
            continue
        ranks = [len(A) for A, _ in parts]
        if kind == "cat":
            made[path] = torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)
        elif len(set(ranks)) == 1:
            made[path] = torch.stack([A for A, _ in parts]).sum(0), torch.stack([B for _, B in parts]).sum(0)
        else:
            raise ValueError(
                f'{path}: the adapters have {ranks} ranks, and combination_type="linear" adds them up one by one. Use '
                'combination_type="cat", which keeps all of them.'
            )
    return made


def check_combination(
    model: nn.Module,
    configs: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    kind: str,
    task: str | None,
) -> None:
    """Refuse what cannot be made into one adapter.

    Args:
        model: With the adapters.
        configs: All of the model's.
        adapters: Names of the adapters.
        weights: One for each.
        kind: PEFT's combination_type.
        task: Whose gate, for adapters that route by task.

    Raises:
        ValueError: An adapter is unknown, routes by token, or by task where none, or an unknown one, is named; it
            adapts a mixture's experts; two have a copy of one module to save; or the kind is not supported.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: expected one weight for each adapter.")
    if kind not in SUPPORTED:
        raise ValueError(
            f"combination_type={kind!r} is not supported for rank experts; {' and '.join(map(repr, SUPPORTED))} are."
        )
    for name in adapters:
        if (config := configs.get(name)) is None:
            raise ValueError(f"The model has no adapter {name!r}; it has {list(configs)}.{nearest(name, configs)}")
        if config.router == "token":
            raise ValueError(
                f"Adapter {name!r} routes by token, and is not supported: its update is no static matrix. "
                "Export it with export_lora(model, path, calibration=...) and combine that."
            )
        if config.router == "task" and task not in (config.tasks or ()):
            raise ValueError(
                f"Adapter {name!r} routes by task, and the adapter that is made cannot. Name one of "
                f"{config.tasks} for it: add_weighted_adapter(..., task=...); found task={task!r}."
            )
        if config.target_parameters:
            raise ValueError(f"Adapter {name!r} adapts the experts of a mixture, which is not supported here.")
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and len(set(adapters) & set(module.modules_to_save)) > 1:
            raise ValueError(
                f"{path}: several of the adapters have a copy of it (modules_to_save), which cannot be added."
            )


def combined_config(
    configs: Mapping[str, Any], adapters: Sequence[str], factors: dict[str, tuple[Tensor, Tensor]]
) -> RankExpertConfig:
    """Return the config of the adapter that is made: dense, with a scale of 1 and a rank for each layer."""
    ranks = {path: len(A) for path, (A, _) in factors.items()}
    r = max(ranks.values())
    different = {path: rank for path, rank in ranks.items() if rank != r}
    first = configs[adapters[0]]
    return RankExpertConfig.lora(
        r=r,
        alpha=r,
        target_modules=sorted(ranks),
        rank_pattern=different,
        alpha_pattern=dict(different),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=True,
    )


@torch.no_grad()
def fill(layers: dict[str, RankExpertLinear], adapter_name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write A and B into a dense adapter whose scale is 1."""
    for path, (A, B) in factors.items():
        adapter = layers[path].rank_experts[adapter_name]
        with onloaded(adapter, keep=True):
            adapter.A.copy_(A)
            adapter.B.copy_(B)


def linear_layers(layers: dict[str, RankExpertLinear]) -> dict[str, RankExpertLinear]:
    """Leave out the experts of mixtures, which no name of a module stands for."""
    return {path: layer for path, layer in layers.items() if not isinstance(layer.base_layer, ExpertProjection)}


def _task_id(layer: RankExpertLinear, adapter: str, task: str | None) -> int | None:
    is_task = layer.rank_experts[adapter].settings.router == "task"
    return layer.scope.tasks[adapter].index(task) if is_task and task is not None else None


@torch.no_grad()
def _part(adapter: RankExpertAdapter, weight: float, kind: str, task_id: int | None) -> tuple[Tensor, Tensor]:
    with onloaded(adapter):
        A, scaled = adapter.factors(task_id)
        B = scaled / adapter.scale if adapter.scale else scaled
    whole = weight * adapter.scale
    if kind == "cat":
        return whole * A, B
    half = math.sqrt(abs(whole))
    return math.copysign(half, whole) * A, half * B
