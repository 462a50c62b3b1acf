"""Layers that read one tensor compute their products with it together: q, k, v; gate, up.

Nothing is assumed of a model's shape or of its names. A call notes which layers read the same tensor one after the
other; in the next call, the first of them to see its input computes the product for all of them, and each of the others
takes its share where it sees that very tensor, unchanged. Where one does not come, it was computed in vain, once.

What was learnt lies in the model's `RoutingScope`, as a mapping that is replaced and never written to, so that a call,
with the recomputation of its checkpointed blocks, holds on to the one that it began with. What was computed lies in the
call, and goes with the last reader, the next input, or the call's end.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .ops import Reader, Shared, has_enough_to_share, may_share, share

if TYPE_CHECKING:
    from .layer import RankExpertLinear

Groups = Mapping["RankExpertLinear", tuple["RankExpertLinear", ...]]
"""For a layer that was the first to read a tensor, all that read it in turn."""


class _State(NamedTuple):
    # What must be as it was when the product was computed.
    version: int
    adapter_name: str
    autocast: torch.dtype | None
    records: bool


class InputSharing:
    """The inputs of one call.

    Args:
        groups: What earlier calls have learnt.
        recomputed: Whether this is a block whose recomputation will run with the same groups.
    """

    def __init__(self, groups: Groups, recomputed: bool = False) -> None:
        self.groups = groups
        self.recomputed = recomputed
        self.learnt: dict[RankExpertLinear, tuple[RankExpertLinear, ...]] = {}
        self._input: weakref.ref[Tensor] | None = None
        self._state: _State | None = None
        self._readers: list[RankExpertLinear] = []
        self._ready: dict[RankExpertLinear, tuple[list[tuple[int, int]], Shared]] = {}

    def take(self, layer: RankExpertLinear, adapter_name: str, x: Tensor) -> Shared | None:
        """Return a layer's share of the products with its input.

        Args:
            layer: The reader.
            adapter_name: Which of its adapters reads.
            x: (…, d_in) its input.

        Returns:
            None where the layer computes on its own.
        """
        if not has_enough_to_share(x):
            return None
        reader = layer.reader(adapter_name)
        if reader is None or not self._is_safe(layer, x) or not may_share(x, reader):
            return None
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        state = _State(x._version, adapter_name, autocast, torch.is_grad_enabled())
        if self._input is None or self._input() is not x or self._state != state:
            self.close()
            self._input, self._state = weakref.ref(x), state
            self._compute(layer, adapter_name, x)
        self._readers.append(layer)
        if (ready := self._ready.pop(layer, None)) is None:
            return None
        computed_for, shared = ready
        return shared if computed_for == _identity(reader) else None

    def close(self) -> None:
        """Note who read the last input, and forget it."""
        found = tuple(dict.fromkeys(self._readers))
        if found and self.groups.get(found[0], found[:1]) != found:
            self.learnt[found[0]] = found
        self._input, self._state = None, None
        self._readers.clear()
        self._ready.clear()

    def _compute(self, layer: RankExpertLinear, adapter_name: str, x: Tensor) -> None:
        readers = {member: member.reader(adapter_name) for member in self.groups.get(layer, ())}
        found = {member: reader for member, reader in readers.items() if reader is not None and may_share(x, reader)}
        if layer in found and (shares := share(x, list(found.values()))):
            for (member, reader), shared in zip(found.items(), shares):
                self._ready[member] = (_identity(reader), shared)

    def _is_safe(self, layer: RankExpertLinear, x: Tensor) -> bool:
        if x.is_inference():
            return False  # It has no version: a change could not be seen.
        if self.recomputed:
            return True
        if torch.is_grad_enabled():
            # A leaf's readers may be differentiated one by one; others' have a graph in common already. And a block
            # that is checkpointed by hand (which saves through hooks, or recomputes) must compute twice alike.
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
            return x.grad_fn is not None and hooks is None and torch._C._current_graph_task_id() == -1
        return not layer.training


def _identity(reader: Reader) -> list[tuple[int, int]]:
    # Of parameters, which live longer than a call.
    return [(id(matrix), matrix._version) for matrix in (reader.A, reader.weight) if matrix is not None]
