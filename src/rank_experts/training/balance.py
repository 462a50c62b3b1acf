"""Loss-free load balancing (arXiv 2408.15664): the bias that moves once per optimiser step, and what to look out for.

Loads come from training forwards, without padding and without tokens that hold a NaN. Nothing here warns or logs;
`trainer.RankExpertCallback` does.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..calls.scope import RoutingScope, Tasks
from ..calls.use_task import routing_scopes
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import device_of, onloaded


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
    balanced = [
        (path, layer, name, adapter)
        for path, layer in adapted_layers(model)
        for name, adapter in layer.rank_experts.items()
        if adapter.settings.load_balance == "bias"
    ]
    if not balanced:
        return {}
    device = device_of(balanced[0][3])
    loads = torch.cat([_take_load(layer, name, adapter.num_experts).to(device) for _, layer, name, adapter in balanced])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loads)
    counts = {}
    for (path, _, name, adapter), load in zip(
        balanced, loads.split([adapter.num_experts for *_, adapter in balanced]), strict=True
    ):
        counts[path, name] = load
        step = adapter.settings.balance_rate * torch.sign(load.mean() - load)
        with onloaded(adapter, keep=True):
            adapter.balance_bias += step.to(adapter.balance_bias.device)
    for scope in routing_scopes(model):
        scope.silent_calls = 0
    return counts


def _take_load(layer: RankExpertLinear, name: str, num_experts: int) -> Tensor:
    load = layer.scope.take_load(layer.path, name)
    return torch.zeros(num_experts) if load is None else load


def count_idle(
    idle: dict[tuple[str, str], Tensor], loads: dict[tuple[str, str], Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Count for every expert the updates in a row in which no token chose it.

    Args:
        idle: (layer's path, adapter) to what this function returned before, (E,); empty at first.
        loads: What `update_router_bias` returned. A layer without any load, of an empty step for instance, tells
            nothing and keeps its counts.

    Returns:
        (layer's path, adapter) to (E,) int64.

    Example:
        >>> count_idle({("q", "default"): torch.tensor([0, 4])}, {("q", "default"): torch.tensor([8.0, 0.0])})
        {('q', 'default'): tensor([0, 5])}
    """
    counts = dict(idle)
    for key, load in loads.items():
        before = idle.get(key, torch.zeros_like(load, dtype=torch.int64)).to(load.device)
        after = torch.where(load > 0, 0, before + 1)
        counts[key] = torch.where(load.sum() > 0, after, before)
    return counts


def dead_experts(idle: dict[tuple[str, str], Tensor], patience: int) -> dict[tuple[str, str], list[int]]:
    """Return (layer's path, adapter) to the experts that had no load in at least `patience` updates in a row.

    Args:
        idle: From `count_idle`.
        patience: Updates.

    Example:
        >>> dead_experts({("q", "default"): torch.tensor([0, 5])}, patience=5)
        {('q', 'default'): [1]}
    """
    dead = {key: (counts >= patience).nonzero().flatten().tolist() for key, counts in idle.items()}
    return {key: experts for key, experts in dead.items() if experts}


def take_nan_examples(model: nn.Module, wait: bool = True) -> dict[str, int]:
    """Count the training examples whose outputs held a NaN since the last call, by task.

    A NaN in one example's input, or an overflow within the model, makes all of that example's outputs NaN, and no
    other's. Looks back over the last 256 forwards.

    Args:
        model: With adapters.
        wait: Wait for an accelerator; False: leave what it is still computing to the next call.

    Returns:
        Task to number of examples: its name, "task 2" where only an id was given, or "unknown task".

    Example:
        >>> take_nan_examples(nn.Linear(2, 2))
        {}
    """
    counts: Counter[str] = Counter()
    for scope in routing_scopes(model):
        while scope.suspects and (wait or scope.suspects[0][1].is_here()):
            tasks, later = scope.suspects.popleft()
            if (nan := later.get()).any():
                names = _names(scope, tasks, len(nan))
                counts.update(names[i] for i in nan.nonzero().flatten().tolist())
    return dict(counts)


def _names(scope: RoutingScope, tasks: Tasks | None, size: int) -> list[str]:
    if tasks is None:
        known = {names[0] for names in scope.tasks.values() if len(names) == 1}
        said = [known.pop() if len(known) == 1 and len(scope.tasks) == 1 else "unknown task"]
    elif isinstance(tasks, Tensor):
        known_names = next(iter(scope.tasks.values())) if len(scope.tasks) == 1 else ()
        said = [known_names[i] if i < len(known_names) else f"task {i}" for i in tasks.tolist()]
    else:
        said = [tasks] if isinstance(tasks, str) else list(tasks)
    return [name for name in said for _ in range(size // len(said))] if said else []
