"""How a call begins where something enters a model, and how one ends that nobody else would end.

What was named by example meets the rows here, once: `enter_batch`.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .call import Call, current_call
from .scope import RoutingScope, Tasks
from .tasks import check_task_ids, count_named


class Guard(NamedTuple):
    """Who must end a call that hooks have begun.

    Attributes:
        forward: The `RoutedForward` around the module's forward.
        frame: The function that runs the hooks and, between them, the forward.
    """

    forward: Any
    frame: FrameType


def begin_call(scope: RoutingScope, outer: Call | None, task_ids: Tasks | None) -> Call:
    """Return a call within another, for other tasks where given.

    Raises:
        TypeError: The tasks are neither ids nor names.
        ValueError: Ids are out of range, or have another shape than (batch,).
    """
    call = Call(scope) if outer is None else outer.fork()
    if task_ids is not None and (scope.tasks or _are_tasks(task_ids)):
        if isinstance(task_ids, Tensor):
            for adapter, tasks in scope.tasks.items():
                if len(scope.tasks) == 1:
                    check_task_ids(task_ids, len(tasks), f"adapter {adapter!r} with tasks {list(tasks)}")
        elif not _are_tasks(task_ids):
            raise TypeError(
                f"task_ids is a {type(task_ids).__name__}: expected an integer tensor (batch,), a task's name, or a "
                "list of names, one an example."
            )
        call.tasks = task_ids
        call.resolved = {}
    return call


def _are_tasks(task_ids: Any) -> bool:
    return isinstance(task_ids, (Tensor, str, list, tuple))


def enter_batch(call: Call, batch: Batch | None) -> None:
    """Tell a call its rows: the one place where what was named by example meets them.

    Raises:
        ValueError: The number of tasks, or of adapter names, does not fit the rows.
    """
    call.batch = batch if batch is None or not call.generates else batch._replace(per_example=None)
    call.resolved = {}
    if (batch := call.batch) is None:
        return
    if call.tasks is not None and call.scope.tasks and not isinstance(call.tasks, str):
        batch.check(count_named(call.tasks), "task ids")
    if call.adapter_names is not None:
        batch.check(len(call.adapter_names), "adapter_names")


def close_interrupted(scope: RoutingScope) -> None:
    """End the calls that hooks have begun and whose forward is over without the hook after it: Ctrl-C leaves it out."""
    if torch.compiler.is_compiling():
        return
    while (call := current_call(scope)) is not None and isinstance(call.owner, Guard):
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not call.owner.frame:
            frame = frame.f_back
        if frame is not None:
            return
        call.owner = None
        call.__exit__()
