"""The adapted layer: a frozen linear layer, adapters beside it, and one formula.

    y = W0 x + s · (g ⊙ (x Aᵀ)) Bᵀ

Shapes: N tokens (all leading dimensions of the input together), d_in and d_out features, r ranks, E experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adaptable import in_out_features
from .context import Call, RoutingScope, task_ids_of_layer
from .mergeable import MergeableLayer
from .ops import Adapted, Reader, decode, load_of_output, rank_experts
from .routing import Routing, TaskRouter, TokenRouter, balance_loss, pool_examples, pool_gathered


class AdapterSettings(NamedTuple):
    """What one adapter of one layer needs to know beside its tensors.

    Attributes:
        alpha: The scale's numerator.
        load_balance: "bias", "loss" or "none"; token router.
        balance_rate: Step of the balancing bias.
        balance_coef: Weight of the balancing loss.
        contrastive_coef: Weight of the contrastive loss; task router.
        contrastive_temperature: Its temperature.
        pooling: "mean", "first" or "last".
        share_inputs: Compute x · [A; W_g]ᵀ together with other layers that read the same x.
    """

    alpha: float
    load_balance: str = "none"
    balance_rate: float = 0.0
    balance_coef: float = 0.0
    contrastive_coef: float = 0.0
    contrastive_temperature: float = 0.05
    pooling: str = "mean"
    share_inputs: bool = True


class RankExpertLinear(nn.Module, MergeableLayer):
    """A linear layer with rank-expert adapters (SMoRA, arXiv 2501.15103; MoRE, 2505.22694; LoRA, 2106.09685).

    It wraps the base layer and calls it; the base layer's weight stays where it is.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a layer that behaves as one.
        path: Its place in the model, for messages.
        scope: Shared by the model's adapted layers.

    Attributes:
        rank_expert_A: Adapter name to A (r, d_in).
        rank_expert_B: Adapter name to B (d_out, r).
        rank_expert_router: Adapter name to `TokenRouter` or `TaskRouter`; a dense adapter has none.

    Example:
        >>> layer = RankExpertLinear(nn.Linear(16, 8), path="proj", scope=RoutingScope())
        >>> layer.add_adapter("default", r=4, settings=AdapterSettings(alpha=4))
        >>> layer(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 8])
    """

    adapter_layer_names = ("rank_expert_A", "rank_expert_B", "rank_expert_router")
    other_param_names = ("rank_expert_dropout", "settings")

    def __init__(self, base_layer: nn.Module, path: str, scope: RoutingScope) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.scope = scope
        self.in_features, self.out_features = in_out_features(base_layer, path)
        self.rank_expert_A = nn.ParameterDict()
        self.rank_expert_B = nn.ParameterDict()
        self.rank_expert_router = nn.ModuleDict()
        self.rank_expert_dropout = nn.ModuleDict()
        self.settings: dict[str, AdapterSettings] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self.merged_tasks: dict[str, int] = {}
        self._weight_before_merge: Any = None
        # Not buffers: DistributedDataParallel would overwrite every rank's counts with the first rank's.
        self._loads: dict[str, Tensor] = {}

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        settings: AdapterSettings,
        router: TokenRouter | TaskRouter | None = None,
        dropout: float = 0.0,
        init_weights: bool = True,
    ) -> None:
        """Create an adapter's parameters on the base layer's device and in its dtype.

        Args:
            adapter_name: A new name.
            r: Ranks.
            settings: Scale and losses.
            router: The gate; None: dense.
            dropout: On the input of A.
            init_weights: B zero; False: B random, for tests.
        """
        self.rank_expert_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.rank_expert_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        self.rank_expert_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.settings[adapter_name] = settings
        if router is not None:
            self.rank_expert_router[adapter_name] = router
        nn.init.kaiming_uniform_(self.rank_expert_A[adapter_name], a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.rank_expert_B[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.rank_expert_B[adapter_name], a=math.sqrt(5))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if isinstance(router, TokenRouter) and settings.load_balance == "bias":
            self._loads[adapter_name] = torch.zeros(router.num_experts, device=router.weight.device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as every PEFT layer does."""
        super().delete_adapter(adapter_name)
        self._loads.pop(adapter_name, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and the active adapters.

        Args:
            x: (…, d_in).

        Returns:
            (…, d_out) in the base layer's output dtype.

        Raises:
            ValueError: A task router was not told the tasks, or they do not fit the input.
        """
        # Not by PEFT's properties, nor by nn.Module's attributes, here and below: decoding has few microseconds.
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        call = self.scope.current()
        if self.merged_adapters:
            self._check_merged_task(call)
            return self.base_layer(x, *args, **kwargs)
        if call is not None and call.adapter_names is not None:
            return self._mixed_adapters(self.base_layer(x, *args, **kwargs), x, call)
        result = self.base_layer(x, *args, **kwargs) if args or kwargs else None
        for adapter_name in self.active_adapters:
            if _held(self._modules["rank_expert_A"], adapter_name) is not None:
                result = self._apply_adapter(result, x, adapter_name, call)
        return self.base_layer(x, *args, **kwargs) if result is None else result

    def _apply_adapter(self, result: Tensor | None, x: Tensor, adapter_name: str, call: Call | None) -> Tensor:
        # The result so far, or None before the base layer: the op applies it where that saves passes.
        settings = self.settings[adapter_name]
        modules: Any = self._modules
        A, B = _held(modules["rank_expert_A"], adapter_name), _held(modules["rank_expert_B"], adapter_name)
        router = _held(modules["rank_expert_router"], adapter_name)
        module = _held(modules["rank_expert_dropout"], adapter_name)
        dropout = module if isinstance(module, nn.Dropout) and module.training else None
        scale = settings.alpha / (router.top_k if isinstance(router, TokenRouter) else A.shape[0])
        if (
            result is None
            and dropout is None
            and not self.training
            and isinstance(router, TokenRouter)
            and (call is None or not call.observers)
            and (decoded := decode(modules["base_layer"], x, A, B, router, scale, want_indices=False)) is not None
        ):
            return decoded.y
        task_ids = self._task_ids(router, x, adapter_name, call) if isinstance(router, TaskRouter) else None
        shared = None
        if call is not None and not torch.compiler.is_compiling():
            shared = call.inputs.take(self, adapter_name, x)
        adapted = rank_experts(
            self.base_layer,
            x,
            A,
            B,
            router,
            task_ids=task_ids,
            scale=scale,
            dropout=dropout,
            output=result,
            want_routing=self._wants_routing(adapter_name, call),
            shared=shared,
        )
        if adapted.routing is not None:
            self._observe(adapted.routing, x, adapter_name)
        if isinstance(router, TokenRouter) and self.training:
            self._report(adapted, router, x, adapter_name, call)
        return adapted.y

    def reader(self, adapter_name: str) -> Reader | None:
        """Return what the layer multiplies its input with; None where it computes on its own."""
        if adapter_name not in self.rank_expert_A or not self.settings[adapter_name].share_inputs:
            return None
        if self.disable_adapters or self.merged or adapter_name not in self.active_adapters:
            return None
        dropout = self.rank_expert_dropout[adapter_name]
        if (isinstance(dropout, nn.Dropout) and dropout.training) or self._wants_routing(adapter_name):
            return None
        router = self._router(adapter_name)
        weight, top_k = (router.weight, router.top_k) if isinstance(router, TokenRouter) else (None, 0)
        return Reader(self.rank_expert_A[adapter_name], self.rank_expert_B[adapter_name], weight, top_k)

    def _report(self, adapted: Adapted, router: TokenRouter, x: Tensor, adapter_name: str, call: Call | None) -> None:
        # What training wants to know of a token router's choice.
        settings = self.settings[adapter_name]
        if settings.load_balance == "none":
            return
        mask = call.token_mask(x) if call is not None else None
        if settings.load_balance == "bias":
            assert adapted.indices is not None
            load = load_of_output(adapted.y, adapted.indices, router.num_experts, mask)
            self._report_load(load, adapter_name, call)
        elif call is not None:
            assert adapted.routing is not None
            call.losses.append((adapter_name, settings.balance_coef * balance_loss(adapted.routing, mask)))

    def _task_ids(self, router: TaskRouter, x: Tensor, adapter_name: str, call: Call | None) -> Tensor:
        # One for each row of gates; what training wants of the tasks is reported on the way.
        settings = self.settings[adapter_name]
        ids = task_ids_of_layer(self.scope, adapter_name, x, self.path)
        if self.training and settings.contrastive_coef and router.num_tasks > 1 and call is not None and x.numel():
            loss = self._contrast(router, ids, x, settings, call)
            call.losses.append((adapter_name, settings.contrastive_coef * loss))
        return ids

    def _contrast(self, router: TaskRouter, ids: Tensor, x: Tensor, settings: AdapterSettings, call: Call) -> Tensor:
        mask = call.token_mask(x)
        if call.gathered is not None:
            tokens, num_tokens, num_examples = call.gathered
            example = tokens // (num_tokens // num_examples)
            pooled, present = pool_gathered(x, example, tokens, num_examples, mask, settings.pooling)
            ids = ids.new_zeros(num_examples).scatter(0, example, ids.expand(len(tokens)))
            return router.contrast(pooled, ids, settings.contrastive_temperature, present)
        example_ids = _one_id_an_example(ids, x)
        examples = x.reshape(example_ids.shape[0], -1, self.in_features)
        mask = None if mask is None else mask.view(examples.shape[:2])
        pooled = pool_examples(examples, mask, settings.pooling)
        return router.contrast(
            pooled, example_ids, settings.contrastive_temperature, None if mask is None else mask.any(1)
        )

    def _wants_routing(self, adapter_name: str, call: Call | None = None) -> bool:
        # Beyond the choice itself: the probabilities, for the balancing loss or for whoever watches.
        call = call or self.scope.current()
        watched = call is not None and bool(call.observers)
        return watched or (self.training and self.settings[adapter_name].load_balance == "loss")

    def _observe(self, routing: Routing, x: Tensor, adapter_name: str) -> None:
        call = self.scope.current()
        if call is not None and call.observers:
            call.observe(self, adapter_name, x, routing)

    def _mixed_adapters(self, result: Tensor, x: Tensor, call: Call) -> Tensor:
        # One adapter an example (PEFT's adapter_names); rows that an example spans, its beams, are adjacent.
        names = call.adapter_names or []
        if len(x) % len(names):
            raise ValueError(
                f"{self.path}: {len(names)} adapter_names for an input of shape {tuple(x.shape)}; expected one name "
                "for each example of the batch."
            )
        names = [name for name in names for _ in range(len(x) // len(names))]
        result = result.clone()
        mask = call.token_mask(x)
        for adapter_name in dict.fromkeys(names):
            if adapter_name not in self.rank_expert_A:
                continue
            rows = torch.tensor([i for i, name in enumerate(names) if name == adapter_name], device=x.device)
            own = call if isinstance(call.tasks, str) else call.fork(tasks=None)
            if isinstance(self._router(adapter_name), TaskRouter) and call.tasks is not None:
                ids = task_ids_of_layer(self.scope, adapter_name, x, self.path)
                own = call.fork(tasks=ids.repeat_interleave(len(x) // len(ids))[rows])
            with own.fork(mask=None if mask is None else mask.view(len(x), -1)[rows]):
                result[rows] = self._apply_adapter(result[rows], x[rows], adapter_name, None)
        return result

    def _report_load(self, load: Tensor, adapter_name: str, call: Call | None) -> None:
        if call is not None:
            call.loads.append((self, adapter_name, load))
        elif torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            # Outside of a call (a block called on its own) count at once, but not when backward recomputes.
            self.add_load(adapter_name, load)

    def add_load(self, adapter_name: str, load: Tensor) -> None:
        """Add (E,) counts to what the next `update_router_bias` will see."""
        with torch.no_grad():
            if self._loads[adapter_name].device != load.device:
                # The adapter came to life on another device than it was created on: meta, when loading sparingly.
                self._loads[adapter_name] = torch.zeros_like(load)
            self._loads[adapter_name].add_(load)

    def take_load(self, adapter_name: str) -> Tensor:
        """Return the (E,) counts since the last call and start again from zero."""
        if self._loads[adapter_name].is_meta:
            device = self.rank_expert_A[adapter_name].device
            self._loads[adapter_name] = torch.zeros(self._loads[adapter_name].shape, device=device)
        load = self._loads[adapter_name].clone()
        self._loads[adapter_name].zero_()
        return load

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name, load in self._loads.items():
            device = self.rank_expert_A[name].device
            if load.device != device:
                self._loads[name] = torch.zeros(load.shape, device=device)
        return self

    def __repr__(self) -> str:
        return "rank_experts." + nn.Module.__repr__(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether PEFT may convert this layer's adapter to LoRA: only a dense one is static."""
        return self._router(adapter_name) is None


def _held(container: Any, name: str) -> Any:
    # What a ParameterDict or ModuleDict holds, from where nn.Module keeps it: their own look-up takes microseconds, of
    # which decoding has few. None: nothing. Not by get(): DeepSpeed's ZeRO-3 fetches a parameter when it is indexed.
    if name in container._parameters:
        return container._parameters[name]
    found = container._modules.get(name)
    return container[name] if found is None and name in container else found


def _one_id_an_example(ids: Tensor, x: Tensor) -> Tensor:
    # (B,) for x (B, …, d_in) from ids that may be one for all, or one a token (from within a compiled graph).
    if x.dim() < 3 or ids.shape[0] == x.shape[0]:
        return ids
    if ids.shape[0] == 1:
        return ids.expand(x.shape[0])
    return ids.view(x.shape[0], -1)[:, 0] if ids.shape[0] > x.shape[0] else ids
