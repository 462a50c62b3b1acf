"""The half of the adapted layer that PEFT's merging asks for: the update as a matrix, in and out of the base weight.

ΔW = s · B diag(g) A        exact for dense gates, and for task gates where one task is named
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base_weight import check_readable, keep_weight, read_weight, restore_weight, write_weight
from .context import Call, RoutingScope, task_ids_of_layer
from .routing import TaskRouter, TokenRouter

if TYPE_CHECKING:
    from .layer import AdapterSettings


class MergeableLayer(BaseTunerLayer):
    """What `RankExpertLinear` has for merging; see its attributes there."""

    path: str
    scope: RoutingScope
    rank_expert_A: nn.ParameterDict
    rank_expert_B: nn.ParameterDict
    rank_expert_router: nn.ModuleDict
    settings: dict[str, AdapterSettings]
    merged_tasks: dict[str, int]
    _weight_before_merge: Any

    def scale(self, adapter_name: str) -> float:
        """Return s: alpha / top_k for a token router, alpha / r for the others (rank scaling is in the gates)."""
        router = self._router(adapter_name)
        divisor = router.top_k if isinstance(router, TokenRouter) else self.rank_expert_A[adapter_name].shape[0]
        return self.settings[adapter_name].alpha / divisor

    def _router(self, adapter_name: str) -> TokenRouter | TaskRouter | None:
        if adapter_name not in self.rank_expert_router:
            return None
        return cast(TokenRouter | TaskRouter, self.rank_expert_router[adapter_name])

    def merge_delta(self, adapter_name: str) -> Tensor:
        """Return the adapter's ΔW = s · B diag(g) A, (d_out, d_in), in float32 or better.

        A task router takes the one task of the surrounding `use_task`.

        Raises:
            ValueError: A token router, whose update is no static matrix, or no single task was named.
        """
        A, B = self.rank_expert_A[adapter_name], self.rank_expert_B[adapter_name]
        self._check_static(adapter_name)
        router = self._router(adapter_name)
        dtype = torch.promote_types(A.dtype, torch.float32)
        scaled = B.to(dtype) * self.scale(adapter_name)
        if isinstance(router, TaskRouter):
            scaled = scaled * router(self.merge_task_id(adapter_name)).gates.to(dtype)
        return scaled @ A.to(dtype)

    def _check_static(self, adapter_name: str) -> None:
        if isinstance(self._router(adapter_name), TokenRouter):
            raise ValueError(
                f"{self.path}: adapter {adapter_name!r} routes by token, so its update differs from token to token and "
                "has no exact static form. Either keep the router (save_rank_experts), or export the best static LoRA "
                "for given data with export_lora(model, path, calibration=dataloader)."
            )

    def merge_task_id(self, adapter_name: str) -> Tensor:
        """Return (1,) the id of the single task to merge: the only one, or that of the surrounding `use_task`."""
        tasks = self.scope.tasks[adapter_name]
        call = self.scope.current()
        named = call.tasks if call is not None else None
        if named is None and len(tasks) == 1:
            named = tasks[0]
        ids = (
            None if named is None else task_ids_of_layer(self.scope, adapter_name, self._probe(adapter_name), self.path)
        )
        if ids is None or len(ids) != 1:
            raise ValueError(
                f"{self.path}: adapter {adapter_name!r} routes by task; a merged weight serves one. Name it: "
                f"merge_rank_experts(model, task=...) with one of {list(tasks)}."
            )
        return ids

    def _probe(self, adapter_name: str) -> Tensor:
        return self.rank_expert_A[adapter_name][:1].detach()

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Raise what `merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in names:
            if name not in self.rank_expert_A:
                continue
            self._check_static(name)
            check_readable(self.get_base_layer(), self.path)
            if safe_merge:
                self._merged_weight([name], safe_merge=True)
            elif isinstance(self._router(name), TaskRouter):
                self.merge_task_id(name)
            if name in self.merged_tasks and int(self.merge_task_id(name)) != self.merged_tasks[name]:
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
            ValueError: See `merge_delta`; or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rank_expert_A]
        if not names:
            return
        merged = self._merged_weight(names, safe_merge)
        with torch.no_grad():
            if not self.merged:
                self._weight_before_merge = keep_weight(self.get_base_layer())
            write_weight(self.get_base_layer(), merged)
            self.merged_adapters.extend(names)
            for name in names:
                if isinstance(self._router(name), TaskRouter):
                    self.merged_tasks[name] = int(self.merge_task_id(name))

    @torch.no_grad()
    def _merged_weight(self, names: list[str], safe_merge: bool) -> Tensor:
        delta: Any = sum(self.merge_delta(name) for name in names)
        delta = delta.T if isinstance(self.get_base_layer(), Conv1D) else delta
        weight = read_weight(self.get_base_layer(), self.path)
        merged = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"{self.path}: merging {names} gives non-finite weights; the base weight is unchanged.")
        return merged

    def unmerge(self) -> None:
        """Put the base weight back, bit by bit."""
        if self._weight_before_merge is not None:
            restore_weight(self.get_base_layer(), self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()
        self.merged_tasks.clear()

    def _check_merged_task(self, call: Call | None) -> None:
        if call is None or call.tasks is None or torch.compiler.is_compiling():
            return
        for adapter_name, merged in self.merged_tasks.items():
            ids = call.task_ids(adapter_name, torch.device("cpu"))
            if bool((ids != merged).any()):
                names = self.scope.tasks[adapter_name]
                other = names[int(ids[ids != merged][0])]
                raise ValueError(
                    f"{self.path}: merged for task {names[merged]!r} and called for {other!r}. "
                    "Call unmerge_rank_experts(model) first, or merge for the other task."
                )
