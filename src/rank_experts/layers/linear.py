"""The adapted layer: a frozen linear layer, and adapters beside it.

    y = W0 x + s · (g ⊙ (x Aᵀ)) Bᵀ        for every active adapter

Shapes: N tokens (all leading dimensions of the input together), d_in and d_out features, r ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.call import Call, Gathered, current_call
from ..calls.padding import token_mask
from ..calls.scope import Place, RoutingScope
from ..calls.tasks import examples_of_tokens, numbers_of_tokens
from ..ops import Base
from .adaptable import in_out_features
from .adapter import AdapterSettings, RankExpertAdapter
from .base import Features, base_of
from .merging import MergeableLayer
from .offloading import device_of, holder, is_offloaded


class RankExpertLinear(nn.Module, MergeableLayer):
    """A linear layer with rank-expert adapters.

    It wraps the base layer and calls it; the base layer's weight stays where it is.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a layer that behaves as one.
        path: Its place in the model, for messages.
        scope: Shared by the model's adapted layers.

    Attributes:
        rank_experts: Adapter name to `RankExpertAdapter`.

    Example:
        >>> layer = RankExpertLinear(nn.Linear(16, 8), path="proj", scope=RoutingScope())
        >>> layer.add_adapter("default", AdapterSettings(r=4, alpha=4))
        >>> layer(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 8])
    """

    adapter_layer_names = ("rank_experts",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, path: str, scope: RoutingScope) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.scope = scope
        self.in_features, self.out_features = in_out_features(base_layer, path)
        self.features = Features(path, self.in_features, self.out_features)
        self.rank_experts: Any = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self.merged_tasks: dict[str, int] = {}
        self._weight_before_merge: Any = None

    def add_adapter(self, adapter_name: str, settings: AdapterSettings, init_weights: bool = True) -> None:
        """Create an adapter on the base layer's device and in its dtype.

        Args:
            adapter_name: A new name.
            settings: Ranks, gate, scale and losses.
            init_weights: B zero; False: B random, for tests.
        """
        place = Place(self.scope, self.path, adapter_name)
        self.rank_experts[adapter_name] = adapter = RankExpertAdapter(
            place, self.in_features, self.out_features, settings, init_weights
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if settings.router == "token" and adapter.balance_bias.is_meta:
            # PEFT's way to a device_map reads parameters from the disk and expects buffers in memory.
            adapter.balance_bias = torch.zeros(adapter.num_experts)
        if settings.load_balance == "bias" and not adapter.A.is_meta:
            self.scope.loads[self.path, adapter_name] = torch.zeros(adapter.num_experts, device=adapter.A.device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Of an offloaded layer PEFT would see the meta device, and the adapter would lose its values there.
        owner = holder(self.base_layer)
        if device is None and is_offloaded(owner):
            device = device_of(owner)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and the active adapters.

        Args:
            x: (…, d_in).

        Returns:
            (…, d_out) in the base layer's output dtype.

        Raises:
            ValueError: A task gate was not told the tasks, or they do not fit the input.
        """
        if self.disable_adapters or self.merged:
            return self._without_adapters(x, *args, **kwargs)
        base = base_of(self.base_layer, self.features, args, kwargs)
        call = current_call(self.scope)
        if call is not None and call.adapter_names is not None:
            return self._mixed_adapters(base.apply(x), x, call)
        y, adapters = None, self.rank_experts
        for name in self.active_adapters:
            if name in adapters:
                y = adapters[name](x, base if y is None else given(y))
        return base.apply(x) if y is None else y

    def _without_adapters(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            self._check_merged_task(current_call(self.scope))
        return self.base_layer(x, *args, **kwargs)

    def _mixed_adapters(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        # One adapter an example (PEFT's adapter_names): each sees the tokens of its own examples.
        names = call.adapter_names or []
        known = list(dict.fromkeys(names))
        numbers = torch.tensor([known.index(name) for name in names], device=x.device)
        flat, mixed = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
        number = numbers_of_tokens(call, self.path, x, numbers, "adapter_names")
        num_examples, examples = examples_of_tokens(call, self.path, x)
        mask = token_mask(call, self.path, x)
        for i, name in enumerate(known):
            if name not in self.rank_experts:
                continue
            tokens = (number == i).nonzero().flatten()
            own_mask = None if mask is None else mask[tokens]
            with call.fork(gathered=Gathered(tokens, examples[tokens], num_examples, own_mask)):
                mixed[tokens] = self.rank_experts[name](flat[tokens], given(mixed[tokens]))
        return mixed.view(y.shape)

    def __repr__(self) -> str:
        return "rank_experts." + nn.Module.__repr__(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether PEFT may convert this layer's adapter to LoRA: only a dense one is static."""
        return self.rank_experts[adapter_name].settings.router == "dense"


def given(y: Tensor) -> Base:
    """Return what stands for a base layer whose output (…, d_out) is there already; the op may overwrite it."""
    return Base(lambda _: y, fresh=True)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, RankExpertLinear]]:
    """Yield (path, layer) for every adapted layer of a model.

    Example:
        >>> list(adapted_layers(nn.Linear(2, 2)))
        []
    """
    for path, module in model.named_modules():
        if isinstance(module, RankExpertLinear):
            yield path, module
