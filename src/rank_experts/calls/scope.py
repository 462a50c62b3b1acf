"""What the adapted layers of one model share, whatever forward is running: whose they are, tasks, and counted loads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .later import Later

Tasks = str | list[str] | Tensor
"""A task's name for all examples, a name an example, or ids (B,)."""

_keys = itertools.count()


class RoutingScope:
    """Shared by the adapted layers of one model: tells its calls from other models' and knows the adapters' tasks.

    Attributes:
        tasks: For every adapter with a task gate, its task names in the order of their ids.
        adapts_experts: The experts of a mixture are among the layers, so that forwards run uncompiled.
        towers: Paths of the model's parts that see images or audio and no text (`images.find_towers`).
        sequence_first: Paths of its parts whose layers may see (L, R, d); windowed: whose see windows (`rows.py`).
        seen_sequence_first: Layers that did see (L, R, d), where L was not R.
        traced: The call while `torch.compile` traces a forward; it cannot see context variables.
        loads: (layer's path, adapter) to (E,) tokens that chose each expert since the last `update_router_bias`. No
            buffers of the layers: DistributedDataParallel would overwrite every rank's counts with the first rank's.
        first_calls: A `FirstCalls` while it is looked at which adapters take part; None: no more.
        silent_calls: Training calls since the last `update_router_bias`.
        unused_losses: Auxiliary losses since the last that took part in a backward pass.
        listeners: Called with the outputs of every training call, before others convert them: accelerate's mixed
            precision makes new outputs of the fields alone.
        suspects: (tasks, (B,) whether an example's outputs hold a NaN) of the latest training calls, to be looked at
            by `balance.take_nan_examples`. Looking at once would make an accelerator wait.
    """

    def __init__(self) -> None:
        self.key = next(_keys)
        self.tasks: dict[str, tuple[str, ...]] = {}
        self.adapts_experts = False
        self.towers: tuple[str, ...] = ()
        self.sequence_first: tuple[str, ...] = ()
        self.windowed: tuple[str, ...] = ()
        self.seen_sequence_first: set[str] = set()
        self.traced: Any = None
        self.loads: dict[tuple[str, str], Tensor] = {}
        self.silent_calls = 0
        self.first_calls: Any = None
        self.unused_losses = 0
        self.listeners: list[Callable[[Any], None]] = []
        self.suspects: deque[tuple[Tasks | None, Later]] = deque(maxlen=256)

    def add_load(self, path: str, adapter: str, load: Tensor) -> None:
        """Add (E,) counts to what the next `update_router_bias` will see."""
        with torch.no_grad():
            known = self.loads.get((path, adapter))
            if known is None:
                self.loads[path, adapter] = load.clone()
            elif known.device != load.device:  # The model has moved.
                self.loads[path, adapter] = known.to(load.device) + load
            else:
                known.add_(load)

    def take_load(self, path: str, adapter: str) -> Tensor | None:
        """Return the (E,) counts since the last call, None where nothing was counted, and start again from zero."""
        known = self.loads.get((path, adapter))
        if known is None:
            return None
        load = known.clone()
        # In place: a compiled graph holds on to the tensor.
        known.zero_()
        return load

    def forget(self, adapter: str) -> None:
        """Drop what is known of an adapter that is gone."""
        self.tasks.pop(adapter, None)
        self.loads = {key: load for key, load in self.loads.items() if key[1] != adapter}

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingScope:
        # A copied model is another model: its calls must not be taken for the original's.
        memo[id(self)] = copied = RoutingScope()
        copied.__setstate__(self.__getstate__())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        kept = ("adapts_experts", "towers", "sequence_first", "windowed")
        return {"tasks": dict(self.tasks)} | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)


class Place(NamedTuple):
    """Which adapter of which layer of which model is meant.

    Attributes:
        scope: The model's.
        path: The layer's place in it.
        adapter: The adapter's name.
    """

    scope: RoutingScope
    path: str
    adapter: str
