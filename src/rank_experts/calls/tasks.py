"""Which task each row of a layer's input is for, from what a caller said of the batch's examples."""

from __future__ import annotations

import torch
from torch import Tensor

from ..messages import nearest
from .batch import Batch
from .call import Call, calls_from_inside
from .rows import Layout, find_layout, refuse_rows
from .scope import Place, RoutingScope, Tasks

_AT_RUN_TIME = "at run time: "


def resolve_task_ids(scope: RoutingScope, tasks: Tasks, adapter: str) -> Tensor:
    """Translate what a caller said of the tasks into ids for one adapter.

    Args:
        scope: Knows the adapter's task names.
        tasks: A name, a list of names, or an integer tensor (B,).
        adapter: The adapter's name.

    Returns:
        (B,) int64; (1,) where one task is meant for all examples.

    Raises:
        ValueError: A name is unknown (the message lists the known ones and the nearest), or an id is out of range.
        TypeError: Neither names nor integers.
    """
    known = scope.tasks[adapter]
    if isinstance(tasks, Tensor):
        check_task_ids(tasks, len(known), f"adapter {adapter!r} with tasks {list(known)}")
        return tasks.long()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    for name in names:
        if name not in known:
            raise ValueError(
                f"Task {name!r} is unknown to adapter {adapter!r}, which knows {list(known)}."
                f"{nearest(str(name), known)}"
            )
    return torch.tensor([known.index(name) for name in names])


def check_task_ids(task_ids: Tensor, num_tasks: int, whose: str) -> None:
    """Check a tensor of task ids: integers, one dimension, 0 … num_tasks − 1.

    Values on an accelerator are not read back, which would stall the step; indexing asserts them there.

    Raises:
        TypeError: Not integers.
        ValueError: Another number of dimensions, or out of range.
    """
    if task_ids.dtype.is_floating_point or task_ids.dtype.is_complex or task_ids.dtype == torch.bool:
        raise TypeError(
            f"task_ids are {task_ids.dtype}: expected an integer tensor (batch,), for instance torch.tensor([0, 2, 1])."
        )
    if task_ids.dim() != 1:
        raise ValueError(f"task_ids have shape {tuple(task_ids.shape)}: expected (batch,), one id an example.")
    if torch.compiler.is_compiling() or task_ids.device.type != "cpu" or task_ids.numel() == 0:
        return
    low, high = int(task_ids.min()), int(task_ids.max())
    if low < 0 or high >= num_tasks:
        wrong = low if low < 0 else high
        raise ValueError(f"task_ids contain {wrong}: expected 0…{num_tasks - 1} for {whose}.")


def known_task_ids(call: Call, adapter: str, device: torch.device) -> Tensor:
    """Return the ids that a call's tasks stand for, (R,) one a row or (1,) one for all; resolved once a call."""
    assert call.tasks is not None
    if (adapter, device) not in call.resolved:
        ids = one_for_all(resolve_task_ids(call.scope, call.tasks, adapter))
        ids = ids if ids.shape[0] == 1 else ids_of_rows(ids, call.batch)
        call.resolved[adapter, device] = ids.to(device, non_blocking=True)
    return call.resolved[adapter, device]


def ids_of_call(call: Call, adapter: str, x: Tensor) -> Tensor:
    """Return the ids that an adapter was asked for in this call, (R,) or (1,), whether they were known when traced."""
    if call.tasks is not None:
        return known_task_ids(call, adapter, x.device)
    known = call.resolved.get((_AT_RUN_TIME + adapter, x.device))
    return torch.zeros(1, dtype=torch.int64, device=x.device) if known is None else known


def one_for_all(ids: Tensor) -> Tensor:
    """Return (1,) ids where they are known to be equal, without waiting for an accelerator; else all."""
    if ids.shape[0] < 2 or torch.compiler.is_compiling() or ids.device.type != "cpu":
        return ids
    return ids[:1] if bool((ids == ids[0]).all()) else ids


def ids_of_rows(ids: Tensor, batch: Batch | None) -> Tensor:
    """Return from ids (B,), of examples with R / B rows side by side each, (R,) ids."""
    if batch is None or ids.shape[0] == batch.num_rows:
        return ids
    batch.check(ids.shape[0], "task ids")
    return ids.repeat_interleave(batch.num_rows // ids.shape[0])


def count_named(tasks: Tasks | list[str]) -> int:
    """Return for how many examples something is named: 1 for a name that is meant for all."""
    if isinstance(tasks, Tensor):
        return tasks.shape[0] if tasks.dim() else 1  # A wrong number of dimensions is refused when they are resolved.
    return 1 if isinstance(tasks, str) else len(tasks)


def task_ids_of_rows(call: Call | None, place: Place, x: Tensor) -> Tensor:
    """Return the task ids that hold for a layer's input.

    Args:
        call: The surrounding one.
        place: The adapter whose tasks are meant.
        x: (…, d_in) the layer's input.

    Returns:
        (G,) int64 on x's device, one for each of G equal parts of the input in turn; (1,) where one task holds for all.

    Raises:
        ValueError: No task was said and the adapter knows several, or nothing ties the input's rows to the tasks.
    """
    if call is None or call.tasks is None:
        if len(place.scope.tasks[place.adapter]) == 1:
            return torch.zeros(1, dtype=torch.int64, device=x.device)
        if torch.compiler.is_compiling():
            return _task_ids_at_run_time(call, place, x)
        raise ValueError(_no_task_message(place))
    return spread_over_rows(call, place.path, x, known_task_ids(call, place.adapter, x.device), "tasks")


def spread_over_rows(call: Call, path: str, x: Tensor, values: Tensor, what: str) -> Tensor:
    """Return from (R,) values, one a row, (G,): one for each of G equal parts of a layer's input in turn.

    Raises:
        ValueError: Nothing ties the input's rows to those of the call.
    """
    number = values.shape[0]  # not len(), which makes a constant of a size that torch.export is to leave open
    if number == 1:
        return values
    if (layout := find_layout(call, path, x, number)) is None:
        if x.numel() == 0:
            return values[:0]
        raise refuse_rows(call, path, x, what)
    return layout.spread(values)


def numbers_of_tokens(call: Call, path: str, x: Tensor, numbers: Tensor, what: str) -> Tensor:
    """Return from (B,) numbers, one an example, (N,): one for each token of a layer's input (…, d).

    Raises:
        ValueError: The numbers do not fit the rows of the call, or nothing ties the input's rows to those.
    """
    numbers = one_for_all(numbers)
    if numbers.shape[0] > 1:
        numbers = spread_over_rows(call, path, x, ids_of_rows(numbers, call.batch), what)
    return numbers.repeat_interleave(x.numel() // x.shape[-1] // max(numbers.shape[0], 1))


def examples_of_tokens(call: Call, path: str, x: Tensor) -> tuple[int, Tensor]:
    """Return R and (N,) int64, the row that each token of a layer's input (…, d) belongs to.

    Where nothing ties them, all tokens are one row's, if one task (and one adapter) holds for all.

    Raises:
        ValueError: Nothing ties them, and several are named.
    """
    num_tokens = x.numel() // x.shape[-1]
    several = [("tasks", call.tasks), ("adapter_names", call.adapter_names)]
    named = [(what, count_named(said)) for what, said in several if said is not None and not is_one(said)]
    num_named = max((number for _, number in named), default=1)
    layout = find_layout(call, path, x, num_named)
    if layout is None:
        if named and num_tokens:
            raise refuse_rows(call, path, x, named[0][0])
        layout = Layout(1)
    return layout.num_rows, layout.owners(num_tokens, x.device)


def is_one(tasks: Tasks | list[str]) -> bool:
    """Say whether what was named by example is known to be the same for all, without waiting for an accelerator."""
    if isinstance(tasks, Tensor):
        return one_for_all(tasks).shape[0] == 1
    return isinstance(tasks, str) or len(set(tasks)) == 1


def _task_ids_at_run_time(call: Call | None, place: Place, x: Tensor) -> Tensor:
    # A `use_task` block around a compiled model is seen when the graph runs, not when it is traced.
    batch = None if call is None else call.batch
    num_rows = x.shape[0] if batch is None else batch.num_rows
    outside = Call(place.scope) if call is None else call
    if (layout := find_layout(outside, place.path, x, num_rows)) is None:
        num_rows = 1  # One task for all fits any rows; several are refused when the graph runs.
    key = (_AT_RUN_TIME + place.adapter, x.device)
    if layout is None or key not in outside.resolved:
        per_example = 1 if batch is None else batch.per_example
        ids = current_task_ids(x, num_rows, per_example, place.scope.key, place.adapter, place.path)
        if layout is None:
            return ids
        outside.resolved[key] = ids
    return layout.spread(outside.resolved[key])


def _no_task_message(place: Place) -> str:
    return (
        f"{place.path}: adapter {place.adapter!r} routes by task and was not told which. Pass model(..., "
        "task_ids=ids), or put the call into `with use_task(model, name):`; its tasks are "
        f"{list(place.scope.tasks[place.adapter])}. "
        "Where activations are checkpointed by hand, put task_ids or use_task inside the checkpointed function."
    )


@torch.library.custom_op("rank_experts::current_task_ids", mutates_args=())
def current_task_ids(
    x: Tensor, num_rows: int, per_example: int | None, scope_key: int, adapter: str, path: str
) -> Tensor:
    """Read the surrounding `use_task` from within a compiled graph: (num_rows,) int64 on x's device."""
    call = next((call for call in calls_from_inside() if call.scope.key == scope_key and call.tasks is not None), None)
    if call is None:
        raise ValueError(
            f"{path}: adapter {adapter!r} routes by task and was not told which. Pass model(..., task_ids=ids), or "
            "put the call into `with use_task(model, name):`."
        )
    ids = one_for_all(resolve_task_ids(call.scope, call.tasks, adapter))
    per_example = None if call.generates else per_example  # `generate` is not part of what was traced.
    rows = Batch(num_rows, said_by=f"{path}'s input", shape=x.shape, per_example=per_example)
    if ids.shape[0] > 1 and num_rows == 1:
        raise refuse_rows(call.fork(batch=rows), path, x, "tasks")
    return ids_of_rows(ids, rows).to(x.device, copy=True)


@current_task_ids.register_fake
def _(x: Tensor, num_rows: int, per_example: int | None, scope_key: int, adapter: str, path: str) -> Tensor:
    return x.new_empty(num_rows, dtype=torch.int64)
