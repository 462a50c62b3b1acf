"""The half of the adapted layer that PEFT's merging asks for: the update in and out of the base weight.

ΔW = s · B diag(g) A        exact for dense gates, and for task gates where one task is named
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..calls.call import Call, current_call
from ..calls.scope import RoutingScope
from ..calls.tasks import known_task_ids
from .base_weight import check_readable, keep_weight, read_weight, restore_weight, write_weight
from .offloading import holder, onloaded


class MergeableLayer(BaseTunerLayer):
    """What `RankExpertLinear` has for merging; see its attributes there."""

    path: str
    scope: RoutingScope
    rank_experts: Any
    merged_tasks: dict[str, int]
    _weight_before_merge: Any

    def task_to_merge(self, adapter_name: str) -> int | None:
        """Return the id of the single task to merge for: the only one, or that of the surrounding `use_task`.

        None for an adapter that routes otherwise, or where no single task is named.
        """
        if self.rank_experts[adapter_name].settings.router != "task":
            return None
        call = current_call(self.scope)
        if call is None or call.tasks is None:
            return 0 if len(self.scope.tasks[adapter_name]) == 1 else None
        ids = known_task_ids(call, adapter_name, torch.device("cpu"))
        return int(ids[0]) if len(ids) == 1 else None

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in names:
            if name not in self.rank_experts:
                continue
            self.rank_experts[name].check_static()
            check_readable(self.get_base_layer(), self.path)
            task = self.task_to_merge(name)
            if safe_merge:
                with self._onloaded():
                    self._merged_weight([name], safe_merge=True)
            elif self.rank_experts[name].settings.router == "task" and task is None:
                self.rank_experts[name].factors(None)  # which says what is missing
            if name in self.merged_tasks and task != self.merged_tasks[name]:
                raise ValueError(
                    f"{self.path}: adapter {name!r} is merged for task "
                    f"{self.scope.tasks[name][self.merged_tasks[name]]!r} already. Call unmerge_rank_experts(model) "
                    "(PEFT: unmerge_adapter) before merging another."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight, keeping a copy of it, so that `unmerge` restores every bit.

        Args:
            safe_merge: Check that the result is finite before the base weight changes.
            adapter_names: Which; None: the active ones.

        Raises:
            ValueError: See `RankExpertAdapter.delta`; or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rank_experts]
        if not names:
            return
        with torch.no_grad(), self._onloaded(keep=True):
            merged = self._merged_weight(names, safe_merge)
            if not self.merged:
                self._weight_before_merge = keep_weight(self.get_base_layer())
            write_weight(self.get_base_layer(), merged)
            self.merged_adapters.extend(names)
            for name in names:
                if (task := self.task_to_merge(name)) is not None:
                    self.merged_tasks[name] = task

    @torch.no_grad()
    def _merged_weight(self, names: list[str], safe_merge: bool) -> Tensor:
        delta: Any = sum(self.rank_experts[name].delta(self.task_to_merge(name)) for name in names)
        delta = delta.T if isinstance(self.get_base_layer(), Conv1D) else delta
        weight = read_weight(self.get_base_layer(), self.path)
        merged = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"{self.path}: merging {names} gives non-finite weights; the base weight is unchanged.")
        return merged

    def unmerge(self) -> None:
        """Put the base weight back, bit by bit."""
        if self._weight_before_merge is not None:
            with self._onloaded(keep=True):
                restore_weight(self.get_base_layer(), self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()
        self.merged_tasks.clear()

    @contextmanager
    def _onloaded(self, keep: bool = False) -> Iterator[None]:
        # The adapters and the base weight; `keep` where the base weight changes.
        with onloaded(self.rank_experts), onloaded(holder(self.get_base_layer()), keep=keep):
            yield

    def _check_merged_task(self, call: Call | None) -> None:
        if call is None or call.tasks is None or torch.compiler.is_compiling():
            return
        for adapter_name, merged in self.merged_tasks.items():
            ids = known_task_ids(call, adapter_name, torch.device("cpu"))
            if bool((ids != merged).any()):
                names = self.scope.tasks[adapter_name]
                other = names[int(ids[ids != merged][0])]
                raise ValueError(
                    f"{self.path}: merged for task {names[merged]!r} and called for {other!r}. "
                    "Call unmerge_rank_experts(model) first, or merge for the other task."
                )
