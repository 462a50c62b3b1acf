"""Recording what the routers decide: `with record_routing(model) as stats:`.

Routers remember nothing. A recording adds an observer to the calls that begin within its block (`context.Call`); each
layer hands it the `Routing` that it computed anyway, and the observer counts. What a checkpointed block recomputes in
the backward pass is not counted again. Inside a compiled graph nobody could look on, so that compiled models run
uncompiled within the block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..calls.call import Call, current_call
from ..calls.padding import token_mask
from ..calls.scope import Place
from ..calls.tasks import check_task_ids, numbers_of_tokens, task_ids_of_rows
from ..calls.use_task import routing_scopes
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import device_of, onloaded
from ..routing.choice import Routing
from ..routing.statistics import LayerStatistics, RoutingCounts, layer_statistics, normalised_entropy


class RoutingStatistics:
    """Counts of how tokens and tasks used the experts, by layer and adapter; made by `record_routing`.

    Args:
        model: With adapters.
        tasks: Names of the tasks that `task_ids` number, for models whose routers know none.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str] | None = None) -> None:
        self._layers = {
            (path, adapter): layer
            for path, layer in adapted_layers(model)
            for adapter, own in layer.rank_experts.items()
            if own.settings.router != "dense"
        }
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no routed adapter: there is nothing to record. Inject one with "
                "RankExpertConfig.smora() or .more(tasks=[...]); a dense adapter uses all ranks for every token."
            )
        self._paths = {(layer.scope, layer.path): path for (path, _), layer in self._layers.items()}
        known = {names for layer in self._layers.values() for names in layer.scope.tasks.values()}
        named = tuple(tasks) if tasks is not None else next(iter(known)) if len(known) == 1 else ()
        self._may_grow = not named
        self._token_tasks = list(named)
        self._counts: dict[tuple[str, str], RoutingCounts] = {}

    def __call__(self, path: str, adapter: str, x: Tensor, routing: Routing, call: Call) -> None:
        """Count one decision of one layer, for its input x (…, d_in)."""
        if (key := (self._paths.get((call.scope, path), ""), adapter)) not in self._layers:
            return
        with torch.no_grad():
            layer = self._layers[key]
            by_task = layer.rank_experts[adapter].settings.router == "task"
            count = self._count_tasks if by_task else self._count_tokens
            new = count(layer, adapter, x, routing, call)
            self._counts[key] = _add(self._counts[key], new) if key in self._counts else new

    def _count_tokens(
        self, layer: RankExpertLinear, adapter: str, x: Tensor, routing: Routing, call: Call
    ) -> RoutingCounts:
        num_tokens, num_experts = routing.probabilities.shape
        mask = token_mask(call, layer.path, x)
        weight = torch.ones(num_tokens, dtype=torch.int64, device=x.device) if mask is None else mask.long()
        row = self._rows_of_tokens(call, x, num_tokens, layer.path)
        cells = (row[:, None] * num_experts + routing.indices).reshape(-1)
        num_rows = 1 + len(self._token_tasks)
        usage = weight.new_zeros(num_rows * num_experts)
        usage.scatter_add_(0, cells, weight[:, None].expand_as(routing.indices).reshape(-1))
        return _sum_rows(usage.view(num_rows, num_experts), row, weight, routing.probabilities)

    def _count_tasks(
        self, layer: RankExpertLinear, adapter: str, x: Tensor, routing: Routing, call: Call
    ) -> RoutingCounts:
        ids = task_ids_of_rows(call, Place(layer.scope, layer.path, adapter), x)
        mask = token_mask(call, layer.path, x)
        if mask is None:
            weight = torch.full_like(ids, x.numel() // x.shape[-1] // len(ids))
        else:
            weight = mask.long().view(len(ids), -1).sum(1)
        num_experts = routing.probabilities.shape[-1]
        used = torch.arange(num_experts, device=ids.device) < routing.indices[:, None]
        usage = weight.new_zeros(1 + len(layer.scope.tasks[adapter]), num_experts)
        usage.index_add_(0, ids + 1, used * weight[:, None])
        return _sum_rows(usage, ids + 1, weight, routing.probabilities)

    def _rows_of_tokens(self, call: Call, x: Tensor, num_tokens: int, path: str) -> Tensor:
        # (N,) 0 where the task is unknown, else 1 + the task's place among the names.
        tasks: Any = call.tasks
        if tasks is None:
            return torch.zeros(num_tokens, dtype=torch.int64, device=x.device)
        if isinstance(tasks, Tensor):
            ids = tasks.detach().cpu()
            limit = 2**31 if self._may_grow else len(self._token_tasks)
            check_task_ids(ids, limit, f"the recording's tasks {self._token_tasks}")
            missing = range(len(self._token_tasks), int(ids.max()) + 1 if ids.numel() else 0)
            self._token_tasks += [f"task {i}" for i in missing]
        else:
            names = [tasks] if isinstance(tasks, str) else list(tasks)
            unknown = [name for name in dict.fromkeys(names) if name not in self._token_tasks]
            if unknown and not self._may_grow:
                raise ValueError(f"{path}: the recording knows the tasks {self._token_tasks}, not {unknown}.")
            self._token_tasks += unknown
            ids = torch.tensor([self._token_tasks.index(name) for name in names])
        try:
            return numbers_of_tokens(call, path, x, 1 + ids.long().to(x.device), "tasks")
        except ValueError:  # A token gate needs no task: tokens that belong to no example are of an unknown one.
            return torch.zeros(num_tokens, dtype=torch.int64, device=x.device)

    def layers(self, adapter_name: str | None = None) -> list[LayerStatistics]:
        """Return what was counted so far, with the layers' tensors as they are now.

        Args:
            adapter_name: Which adapter; None: the first one that is active.

        Raises:
            ValueError: The model has no such routed adapter.
        """
        adapters = list(dict.fromkeys(adapter for _, adapter in self._layers))
        if adapter_name is None:
            active = next(iter(self._layers.values())).active_adapters
            adapter_name = next((name for name in active if name in adapters), adapters[0])
        if adapter_name not in adapters:
            raise ValueError(f"The model has no routed adapter {adapter_name!r}; it has {adapters}.")
        return [
            self._layer(path, adapter_name, layer)
            for (path, adapter), layer in self._layers.items()
            if adapter == adapter_name
        ]

    def _layer(self, path: str, adapter: str, layer: RankExpertLinear) -> LayerStatistics:
        own = layer.rank_experts[adapter]
        is_task = own.settings.router == "task"
        tasks = layer.scope.tasks[adapter] if is_task else tuple(self._token_tasks)
        with onloaded(own):
            tensors = {
                name: value.full_tensor() if hasattr(value, "full_tensor") else value.cpu()
                for name, value in own.state_dict().items()
            }
        counts = self._counts.get((path, adapter))
        if counts is not None:
            counts = RoutingCounts(*(_grow(table, 1 + len(tasks)).cpu() for table in _tables(counts)))
        return layer_statistics(layer.path, tensors, tasks=tasks, counts=counts)

    def all_reduce(self) -> RoutingStatistics:
        """Return the counts of all data-parallel ranks together; the own counts stay as they are.

        All ranks must call it. Without a process group it returns a copy.

        Example:
            >>> with record_routing(ddp_model) as stats:  # doctest: +SKIP
            ...     evaluate(ddp_model)
            >>> total = stats.all_reduce()  # doctest: +SKIP
        """
        total = copy.copy(self)
        total._counts = dict(self._counts)
        if not (dist.is_available() and dist.is_initialized()):
            return total
        # A rank may have met other tasks, or no data at all: first agree on the names and the shapes.
        theirs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(theirs, self._token_tasks)
        total._token_tasks = list(dict.fromkeys(name for names in theirs for name in names))
        place = [0, *(1 + total._token_tasks.index(name) for name in self._token_tasks)]
        for key, layer in self._layers.items():
            own = layer.rank_experts[key[1]]
            is_task = own.settings.router == "task"
            num_rows = 1 + len(layer.scope.tasks[key[1]] if is_task else total._token_tasks)
            zeros = _zeros(num_rows, own.num_experts, device_of(own))
            if key in self._counts:
                for table, counted in zip(_tables(zeros), _tables(self._counts[key])):
                    table[torch.arange(len(counted)) if is_task else place[: len(counted)]] = counted
            for table in _tables(zeros):
                dist.all_reduce(table)
            total._counts[key] = zeros
        return total


def _tables(counts: RoutingCounts) -> tuple[Tensor, Tensor, Tensor]:
    return counts.usage, counts.tokens, counts.entropy


def _float64(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _zeros(num_rows: int, num_experts: int, device: torch.device) -> RoutingCounts:
    usage = torch.zeros(num_rows, num_experts, dtype=torch.int64, device=device)
    return RoutingCounts(usage, usage.new_zeros(num_rows), torch.zeros(num_rows, dtype=_float64(device), device=device))


def _sum_rows(usage: Tensor, row: Tensor, weight: Tensor, probabilities: Tensor) -> RoutingCounts:
    counts = _zeros(len(usage), usage.shape[1], usage.device)
    entropy = normalised_entropy(probabilities).to(counts.entropy.dtype)
    # An excluded token must not count, not even as 0 · NaN.
    entropy = torch.where(weight > 0, entropy * weight, 0)
    counts.tokens.index_add_(0, row, weight)
    counts.entropy.index_add_(0, row, entropy)
    return RoutingCounts(usage, counts.tokens, counts.entropy)


def _grow(table: Tensor, num_rows: int) -> Tensor:
    return torch.cat([table, table.new_zeros(num_rows - len(table), *table.shape[1:])])


def _add(first: RoutingCounts, second: RoutingCounts) -> RoutingCounts:
    # The later one may know more tasks.
    return RoutingCounts(*(_grow(a, len(b)) + b.to(a.device) for a, b in zip(_tables(first), _tables(second))))


@contextmanager
def record_routing(model: nn.Module, tasks: Sequence[str] | None = None) -> Iterator[RoutingStatistics]:
    """Record what the routers of a model decide within a block, in training or evaluation.

    Counts tokens that are not padding. What gradient checkpointing computes a second time is counted once. Under data
    parallelism every rank counts its own; `stats.all_reduce()` adds them up. Compiled models run uncompiled within
    the block (`torch.compiler.set_stance`), because nobody can look into a compiled graph: record some batches, not a
    whole training. Holds in this thread (and its coroutines) alone, as `use_task` does. Where blocks are checkpointed
    by hand, let the backward pass lie within the block too: torch refuses a recomputation that computes less.

    Token routers need no tasks, but their use is told apart by task where `task_ids` are passed to the model.

    Args:
        model: With adapters; wrapped in `PeftModel`, DistributedDataParallel or FSDP, compiled or not.
        tasks: Names for `task_ids`, where the model has token routers only. None: "task 0", "task 1", …

    Yields:
        `RoutingStatistics`, readable within the block and after it.

    Raises:
        ValueError: No adapter of the model has a router.

    Example:
        >>> with record_routing(model) as stats:  # doctest: +SKIP
        ...     model(**batch)
        >>> [layer.dead_experts for layer in stats.layers()]  # doctest: +SKIP
    """
    stats = RoutingStatistics(model, tasks)
    calls = []
    for scope in routing_scopes(model):
        outer = current_call(scope)
        call = Call(scope) if outer is None else outer.fork(records=None)
        call.observers = (*call.observers, stats)
        calls.append(call)
    with torch.compiler.set_stance("force_eager"):
        for call in calls:
            call.__enter__()
        try:
            yield stats
        finally:
            for call in reversed(calls):
                call.__exit__()
