"""What a forward pass knows beyond its tensors: tasks, padding, and what the layers report back.

An adapted layer sees only its input. Which task each example belongs to, which tokens are padding, and where load
counts and auxiliary losses go, it learns from the `Call` that surrounds it. A call is found through a context
variable, so that threads and coroutines that run side by side do not see each other's, and it belongs to the
`RoutingScope` of one model, so that models may be nested. There is no other state: a call ends with its forward.

Gradient checkpointing runs a block again during the backward pass, when the call is gone and, on a GPU, in another
thread. `CheckpointInCall` therefore takes the call along into the block and returns the block's auxiliary losses as
outputs of it, so that their gradients are exact in both of torch's modes; what the second run reports is dropped.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .config import nearest
from .sharing import Groups, InputSharing

if TYPE_CHECKING:
    from .layer import RankExpertLinear
    from .routing import Routing

Tasks = str | list[str] | Tensor

_current_call: ContextVar[Call | None] = ContextVar("rank_experts_call", default=None)
_scope_keys = itertools.count()


class Gathered(NamedTuple):
    """Where tokens come from that a mixture of experts gathered from all over the batch.

    Attributes:
        tokens: (n,) int64, each one's place among the batch's tokens.
        num_tokens: N, the batch's.
        num_examples: B; an example has N / B tokens in a row.
    """

    tokens: Tensor
    num_tokens: int
    num_examples: int


class RoutingScope:
    """Shared by the adapted layers of one model: tells its calls from other models' and knows the adapters' tasks.

    Attributes:
        tasks: For every adapter with a task router, its task names in the order of their ids.
        adapts_experts: The experts of a mixture are among the layers, so that forwards run uncompiled.
        traced: The call while `torch.compile` traces a forward; it cannot see context variables.
        groups: Which layers read the same inputs; see `sharing`.
        silent_calls: Training calls since the last `update_router_bias`.
        unused_losses: Auxiliary losses since the last that took part in a backward pass.
        suspects: (tasks, (B,) whether an example's outputs hold a NaN) of the latest training calls, to be looked at
            by `balance.take_nan_examples`. Looking at once would make an accelerator wait.
    """

    def __init__(self) -> None:
        self.key = next(_scope_keys)
        self.tasks: dict[str, tuple[str, ...]] = {}
        self.adapts_experts = False
        self.traced: Call | None = None
        self.groups: Groups = {}
        self.silent_calls = 0
        self.unused_losses = 0
        self.suspects: deque[tuple[Tasks | None, Tensor]] = deque(maxlen=256)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingScope:
        # A copied model is another model: its calls must not be taken for the original's.
        memo[id(self)] = copied = RoutingScope()
        copied.__setstate__(self.__getstate__())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"tasks": dict(self.tasks), "adapts_experts": self.adapts_experts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def current(self) -> Call | None:
        """Return the innermost call of this scope, or None outside of one."""
        if torch.compiler.is_compiling():
            return self.traced
        call = _current_call.get()
        while call is not None and call.scope is not self:
            call = call.outer
        return call


@dataclass(eq=False)
class Call:
    """One forward pass, or one `use_task` block, of the model that owns `scope`.

    Attributes:
        scope: Whose call it is.
        tasks: A name for all examples, a name an example, or ids (B,); None: not said.
        adapter_names: An adapter's name an example, for PEFT's mixed-adapter batches; None: the active adapters.
        mask: (B, L) true where a token is not padding; None: all are tokens.
        target_mask: The same for a decoder that is given labels and no mask.
        labels: The labels that the model was called with, and `num_items` how many the whole step has.
        gathered: Where the tokens of the layers' inputs come from; None: they are the batch's, in its order.
        memory: What a decoder reads from its encoder, and `memory_mask` which of it is not padding.
        loads: (layer, adapter, counts) reported by token routers.
        losses: (adapter, loss) reported by layers with an auxiliary loss.
        owner: Whoever must end the call, where that is not a `with` block.
        observers: Called with (layer, adapter, x, routing, call) when a layer routes; see `recording.record_routing`.
        inputs: What layers have computed together; None: a new one.
    """

    scope: RoutingScope
    tasks: Tasks | None = None
    adapter_names: list[str] | None = None
    mask: Tensor | None = None
    target_mask: Tensor | None = None
    labels: Any = None
    num_items: Any = None
    gathered: Gathered | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    loads: list[tuple[RankExpertLinear, str, Tensor]] = field(default_factory=list)
    losses: list[tuple[str, Tensor]] = field(default_factory=list)
    observers: tuple[Callable[..., None], ...] = ()
    outer: Call | None = None
    owner: Any = None
    inputs: InputSharing = field(default=None)  # type: ignore[assignment]
    _resolved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.inputs is None:
            self.inputs = InputSharing({} if torch.compiler.is_compiling() else self.scope.groups)

    def fork(self, **changes: Any) -> Call:
        """Return a call with the same tasks, masks and observers that collects its own loads and losses."""
        inherited = ("tasks", "adapter_names", "mask", "target_mask", "gathered", "memory", "memory_mask", "observers")
        values = {name: getattr(self, name) for name in inherited}
        values.update(changes)
        return Call(self.scope, **values)

    def task_ids(self, adapter: str, device: torch.device) -> Tensor:
        """Return the (B,) or (1,) ids that `tasks` stands for; resolved once a call."""
        assert self.tasks is not None
        if (adapter, device) not in self._resolved:
            ids = resolve_task_ids(self.scope, self.tasks, adapter)
            self._resolved[adapter, device] = ids.to(device, non_blocking=True)
        return self._resolved[adapter, device]

    def __enter__(self) -> Call:
        if torch.compiler.is_compiling():
            self.outer = self.scope.traced
            self.scope.traced = self
        else:
            self.outer = _current_call.get()
            _current_call.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if torch.compiler.is_compiling():
            self.scope.traced = self.outer
        else:
            _current_call.set(self.outer)
            self.inputs.close()
            if self.inputs.learnt:
                self.scope.groups = {**self.scope.groups, **self.inputs.learnt}

    def observe(self, layer: RankExpertLinear, adapter: str, x: Tensor, routing: Routing) -> None:
        """Tell the observers what a layer decided for its input x (…, d_in); not when backward recomputes it."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        for observer in self.observers:
            observer(layer, adapter, x, routing, self)

    def token_mask(self, x: Tensor) -> Tensor | None:
        """Return (N,) true where a token of a layer's input (B, L, d) or (N, d) is not padding; None: all are."""
        mask = self.mask
        if self.memory is not None and _same_tensor(x, self.memory):
            mask = self.memory_mask
        num_tokens = x.numel() // x.shape[-1]
        if mask is None or mask.dim() != 2 or mask.numel() != num_tokens:
            return None
        return mask.reshape(-1).bool()


def _same_tensor(x: Tensor, other: Tensor) -> bool:
    # Reentrant checkpointing hands a block detached copies, which share the storage.
    return x is other or (
        not torch.compiler.is_compiling() and x.shape == other.shape and x.data_ptr() == other.data_ptr()
    )


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


def task_ids_of_layer(scope: RoutingScope, adapter: str, x: Tensor, path: str) -> Tensor:
    """Return the task ids that hold for a layer's input, one an example or one for all.

    Args:
        scope: The layer's.
        adapter: The adapter whose tasks are meant.
        x: (…, d_in) the layer's input; its rows must be a multiple of the ids.
        path: The layer's place in the model, for messages.

    Returns:
        (B,) or (1,) int64 on x's device. Rows that an example spans (tokens, beams, returned sequences) are adjacent.

    Raises:
        ValueError: No task was said and the adapter knows several, or the rows do not fit the ids.
    """
    num_tasks = len(scope.tasks[adapter])
    call = scope.current()
    num_rows = x.numel() // x.shape[-1]
    if call is None or call.tasks is None:
        if num_tasks == 1:
            return torch.zeros(1, dtype=torch.int64, device=x.device)
        if torch.compiler.is_compiling():
            # A `use_task` block around a compiled model is seen when the graph runs, not when it is traced.
            return current_task_ids(x, scope.key, adapter, path)
        raise ValueError(_no_task_message(scope, adapter, path))
    ids = call.task_ids(adapter, x.device)
    if num_rows == 0:
        return ids[:0]
    num_ids = ids.shape[0]  # not len(), which makes a constant of a size that torch.export is to leave open
    if num_ids == 0 or num_rows % num_ids or (x.dim() > 2 and x.shape[0] % num_ids):
        raise ValueError(
            f"{path}: {num_ids} task ids for an input of shape {tuple(x.shape)}. Expected one id for each example of "
            "the batch (rows that an example spans, its tokens or beams, must be adjacent)."
        )
    return ids


def _no_task_message(scope: RoutingScope, adapter: str, path: str) -> str:
    return (
        f"{path}: adapter {adapter!r} routes by task and was not told which. Pass model(..., task_ids=ids), or put "
        f"the call into `with use_task(model, name):`; its tasks are {list(scope.tasks[adapter])}. Where activations "
        "are checkpointed by hand, put task_ids or use_task inside the checkpointed function."
    )


@torch.library.custom_op("rank_experts::current_task_ids", mutates_args=())
def current_task_ids(x: Tensor, scope_key: int, adapter: str, path: str) -> Tensor:
    """Read the surrounding `use_task` from within a compiled graph: (N,) int64, one id for each row of x."""
    call = _current_call.get()
    while call is not None and (call.scope.key != scope_key or call.tasks is None):
        call = call.outer
    if call is None or call.tasks is None:
        raise ValueError(
            f"{path}: adapter {adapter!r} routes by task and was not told which. Pass model(..., task_ids=ids), or "
            "put the call into `with use_task(model, name):`."
        )
    ids = resolve_task_ids(call.scope, call.tasks, adapter).to(x.device)
    num_rows = x.numel() // x.shape[-1]
    if len(ids) == 0 or num_rows % len(ids):
        raise ValueError(f"{path}: {len(ids)} task ids for an input of shape {tuple(x.shape)}.")
    return ids.repeat_interleave(num_rows // len(ids))


@current_task_ids.register_fake
def _(x: Tensor, scope_key: int, adapter: str, path: str) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.int64)


class CheckpointInCall:
    """A checkpoint function that takes the current call along into the block and into its recomputation.

    Args:
        checkpoint: torch's, with its options bound, as transformers keeps it in `_gradient_checkpointing_func`.
        scope: Whose calls to take along.
    """

    def __init__(self, checkpoint: Callable[..., Any], scope: RoutingScope) -> None:
        self.checkpoint = checkpoint
        self.scope = scope

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function(*args)` and return what it returns."""
        call = self.scope.current()
        if call is None:
            return self.checkpoint(function, *args, **kwargs)
        runs: list[tuple[Call, bool]] = []

        def run(*inner_args: Any, **inner_kwargs: Any) -> tuple[Any, ...]:
            # The observers come along into the recomputation, which must save what the first run saved: a layer that
            # is watched computes more. What it reports then, `Call.observe` drops.
            with call.fork(inputs=InputSharing(call.inputs.groups, recomputed=True)) as own:
                outputs = function(*inner_args, **inner_kwargs)
            is_tuple = isinstance(outputs, tuple)
            runs.append((own, is_tuple))
            losses = tuple(loss for _, loss in own.losses)
            # Flat, because reentrant checkpointing follows gradients only through a flat tuple.
            return (*outputs, *losses) if is_tuple else (outputs, *losses)

        returned = self.checkpoint(run, *args, **kwargs)
        first, is_tuple = runs[0]
        num_outputs = len(returned) - len(first.losses)
        call.loads.extend(first.loads)
        call.losses.extend((adapter, loss) for (adapter, _), loss in zip(first.losses, returned[num_outputs:]))
        return returned[:num_outputs] if is_tuple else returned[0]


def bind_checkpointing(module: torch.nn.Module, scope: RoutingScope) -> None:
    """Make every checkpointed block of a model take the scope's calls along; harmless where done already.

    Knows the two places where a checkpoint function is kept: transformers' `_gradient_checkpointing_func` and the
    `checkpoint_fn` of torch's CheckpointWrapper, which accelerate uses for FSDP.
    """
    for block in module.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            checkpoint = block.__dict__.get(name)
            if checkpoint is not None and not isinstance(checkpoint, CheckpointInCall):
                setattr(block, name, CheckpointInCall(checkpoint, scope))


def unbind_checkpointing(module: torch.nn.Module) -> None:
    """Put the original checkpoint functions back."""
    for block in module.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            if isinstance(checkpoint := block.__dict__.get(name), CheckpointInCall):
                setattr(block, name, checkpoint.checkpoint)
