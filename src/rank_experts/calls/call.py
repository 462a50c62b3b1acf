"""What one forward pass knows beyond its tensors: tasks, padding, and where loads and auxiliary losses go.

An adapted layer sees only its input. The rest it learns from the `Call` that surrounds it. A call is found through a
context variable, so that threads and coroutines that run side by side do not see each other's, and it belongs to the
`RoutingScope` of one model, so that models may be nested. There is no other state: a call ends with its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .scope import RoutingScope, Tasks

_innermost: ContextVar[Call | None] = ContextVar("rank_experts_call", default=None)

_INHERITED = (
    *("tasks", "handed_on", "batch", "adapter_names", "mask", "target_mask", "gathered", "memory", "memory_mask"),
    *("records", "generates", "observers"),
)


class Gathered(NamedTuple):
    """Where tokens come from that a mixture of experts gathered from all over the batch.

    Attributes:
        tokens: (n,) int64, each one's place among the batch's tokens.
        examples: (n,) int64, the row of the batch that it belongs to.
        num_examples: R, the batch's rows.
        mask: (n,) true where it is not padding; None: all are tokens.
    """

    tokens: Tensor
    examples: Tensor
    num_examples: int
    mask: Tensor | None = None


@dataclass(eq=False)
class Call:
    """One forward pass, or one `use_task` block, of the model that owns `scope`.

    Attributes:
        scope: Whose call it is.
        tasks: A name for all examples, a name an example, or ids (B,); None: not said.
        handed_on: The `task_ids` that a wrapper was called with, for a model that has such an argument itself.
        batch: How many rows the forward has and how long they are; None: not said.
        adapter_names: An adapter's name an example, for PEFT's mixed-adapter batches; None: the active adapters.
        mask: (B, L) true where a token is not padding; None: all are tokens.
        target_mask: The same for a decoder that is given labels and no mask.
        labels: The labels that the model was called with, and `num_items` how many the whole step has.
        gathered: Where the tokens of the layers' inputs come from; None: they are the batch's, in its order.
        memory: What a decoder reads from its encoder, and `memory_mask` which of it is not padding.
        records: Whether gradients are recorded in the forward that this is; None: it is no forward of the model.
        generates: Within `generate`, where an example may have several rows.
        loads: (layer's path, adapter, counts) of token gates.
        losses: (adapter, loss) of layers with an auxiliary loss.
        is_unrecorded: A loss was computed while no gradients were recorded, although the forward records them.
        observers: Called with (path, adapter, x, routing, call) when a layer routes; see `reports.record_routing`.
        outer: The call that surrounds this one in its thread or coroutine.
        owner: Whoever must end the call, where that is not a `with` block.
        is_open: False once it has ended.
    """

    scope: RoutingScope
    tasks: Tasks | None = None
    handed_on: Tasks | None = None
    batch: Batch | None = None
    adapter_names: list[str] | None = None
    mask: Tensor | None = None
    target_mask: Tensor | None = None
    labels: Any = None
    num_items: Any = None
    gathered: Gathered | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    records: bool | None = None
    generates: bool = False
    loads: list[tuple[str, str, Tensor]] = field(default_factory=list)
    losses: list[tuple[str, Tensor]] = field(default_factory=list)
    is_unrecorded: bool = False
    observers: tuple[Callable[..., None], ...] = ()
    outer: Call | None = None
    owner: Any = None
    is_open: bool = False
    resolved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def fork(self, **changes: Any) -> Call:
        """Return a call with the same tasks, masks and observers that collects its own loads and losses."""
        values = {name: getattr(self, name) for name in _INHERITED}
        if "tasks" not in changes and "batch" not in changes:
            # What is traced within a block must not be used outside of it.
            values["resolved"] = dict(self.resolved) if torch.compiler.is_compiling() else self.resolved
        values.update(changes)
        return Call(self.scope, **values)

    def __enter__(self) -> Call:
        self.is_open = True
        if torch.compiler.is_compiling():
            self.outer = self.scope.traced
            self.scope.traced = self
        else:
            self.outer = _innermost.get()
            _innermost.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.is_open = False
        if torch.compiler.is_compiling():
            self.scope.traced = self.outer
            return
        # Of calls that are left out of order, as interleaved generators do it, those that have ended are passed over.
        innermost = _innermost.get()
        while innermost is not None and not innermost.is_open:
            innermost = innermost.outer
        _innermost.set(innermost)


def current_call(scope: RoutingScope) -> Call | None:
    """Return the innermost open call of a scope, or None outside of one."""
    if torch.compiler.is_compiling():
        return scope.traced
    call = _innermost.get()
    while call is not None and (call.scope is not scope or not call.is_open):
        call = call.outer
    return call


def calls_from_inside() -> Any:
    """Yield the open calls of all scopes, from the innermost outwards."""
    call = _innermost.get()
    while call is not None:
        if call.is_open:
            yield call
        call = call.outer
