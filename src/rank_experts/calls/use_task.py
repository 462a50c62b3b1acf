"""Tasks for a block of calls that cannot pass `task_ids`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .boundary import routed_forward
from .call import Call, calls_from_inside, current_call
from .entering import close_interrupted
from .scope import RoutingScope, Tasks
from .tasks import resolve_task_ids


@contextmanager
def use_task(model: nn.Module, tasks: Tasks) -> Iterator[None]:
    """Say for a block of calls which task, or which task an example, the adapters shall route for.

    For calls that cannot pass `task_ids`, `generate` above all. Holds in this thread (and its coroutines) alone.
    Rows that one example spans, beams and returned sequences, follow the example.

    Args:
        model: A model with a task-routed adapter.
        tasks: A task's name for all examples, a list of names or an integer tensor (batch,), one an example.

    Raises:
        ValueError: The model has no task router, or a task is unknown (the message lists the known ones).
        RuntimeError: The block is left while one that was entered later is still open, as interleaved generators do:
            what ran in between ran for the later one's task.

    Example:
        >>> with use_task(model, "rte"):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    routed = routed_forward(model)
    scopes = [scope for scope in ([routed.scope] if routed else routing_scopes(model)) if scope.tasks]
    if not scopes:
        raise ValueError(
            f"use_task: {type(model).__name__} has no task-routed adapter. "
            "Inject one with RankExpertConfig.more(tasks=[...]), or leave use_task out."
        )
    calls = []
    for scope in scopes:
        close_interrupted(scope)
        _check_known(scope, tasks)
        outer = current_call(scope)
        calls.append(Call(scope, tasks=tasks) if outer is None else outer.fork(tasks=tasks, records=None))
    for call in calls:
        call.__enter__()
    try:
        yield
    except BaseException:
        _leave(calls)
        raise
    if _leave(calls):
        raise RuntimeError(
            "A use_task block was left while one that was entered later is still open: what ran in between ran for the "
            "later one's task. Generators that take turns share their caller's calls: run each in a thread, a task of "
            "asyncio or a context of its own (contextvars.copy_context().run), or pass model(..., task_ids=ids)."
        )


def _leave(calls: list[Call]) -> bool:
    # Whether a call that is none of these was still open within them.
    own = set(map(id, calls))
    is_inside = False
    for call in calls_from_inside():
        if id(call) in own:
            break
        is_inside = is_inside or call.scope in {each.scope for each in calls}
    else:
        is_inside = False  # Left in another thread or coroutine than it was entered in.
    for call in reversed(calls):
        call.__exit__()
    return is_inside


def routing_scopes(model: nn.Module) -> list[RoutingScope]:
    """Return the scopes of a model's adapted layers: one, or several where parts were injected apart.

    Adapted layers are known by the scope that they hold.
    """
    held = (module.__dict__.get("scope") for module in model.modules())
    return list({id(scope): scope for scope in held if isinstance(scope, RoutingScope)}.values())


def _check_known(scope: RoutingScope, tasks: Tasks) -> None:
    # Adapters may know different tasks; what none of them knows is refused here, the rest where a layer asks.
    refusals = []
    for adapter_name in scope.tasks:
        try:
            resolve_task_ids(scope, tasks, adapter_name)
            return
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]
