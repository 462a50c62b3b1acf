"""A model loader for vLLM, its public extension point: one adapter becomes part of the model. Imports vLLM.

`--load-format rank_experts --model-loader-extra-config '{"adapter": "folder"}'` (or "folder?task=rte") adds the
adapter's update to the output of each layer that it adapts, for every request. There are no slots and no LoRA
machinery, so that vLLM's compilation sees a few products and the gate.

The update is added where a layer has multiplied by its weight and before it adds up or gathers over processes, so that
with tensor parallelism every process adds its share; the router's logits of a layer whose input is split are summed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.utils import get_packed_modules_mapping

from ...files.reading import AdapterFiles, read_adapter_files
from ...routing import TokenGate, token_routing
from .fitting import check_complete, check_shapes, part_sizes, renamed
from .served import ServedLayer, served_layers, split_task

FORMAT = "rank_experts"
_SERVED = (ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)


class Update(nn.Module):
    """B (g ⊙ A x) of one of the layers that lie in a vLLM layer, this process's share of it.

    Args:
        layer: What it computes with.
        rows: Which rows of B are this process's.
        columns: Which of A's and W_g's columns are, where the input is split.
        dtype: The model's.
        device: Where the layer is.
    """

    A: Tensor
    B: Tensor
    router_weight: Tensor
    balance_bias: Tensor

    def __init__(
        self, layer: ServedLayer, rows: Tensor, columns: slice | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        own = slice(None) if columns is None else columns
        self.splits_input = columns is not None
        self.register_buffer("A", layer.A[:, own].to(device, dtype).contiguous(), persistent=False)
        self.register_buffer("B", layer.B[rows].to(device, dtype).contiguous(), persistent=False)
        self.settings = None
        if (gate := layer.gate) is not None:
            # In float32 whatever the model's dtype, as in training.
            self.register_buffer("router_weight", gate.weight[:, own].to(device).contiguous(), persistent=False)
            self.register_buffer("balance_bias", gate.balance_bias.to(device), persistent=False)
            self.settings = gate[2:]

    def forward(self, x: Tensor) -> Tensor:
        """Return the update (N, d_out) to add for x (N, d_in)."""
        u = x @ self.A.t()
        if self.settings is not None:
            gate = TokenGate(self.router_weight, self.balance_bias, *self.settings)
            logits = gate.logits(x)
            if self.splits_input:
                logits = tensor_model_parallel_all_reduce(logits)
            gates = token_routing(
                logits,
                gate.balance_bias,
                top_k=gate.top_k,
                expert_rank=gate.expert_rank,
                score_function=gate.score_function,
                biased_gates=gate.biased_gates,
            ).gates
            u = u * gates.to(u.dtype)
        return u @ self.B.t()


class AdaptedMethod:
    """In the place of a linear layer's `quant_method`: its product, and the updates beside it.

    Everything else of the method is the wrapped one's.
    """

    def __init__(self, method: Any, places: list[tuple[int, int]]) -> None:
        self.method = method
        self.places = places

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the layer's output in this process, with the updates of `layer.rank_experts` in their places."""
        y = self.method.apply(layer, x, bias)
        rows = x.reshape(-1, x.shape[-1])
        for (start, stop), update in zip(self.places, layer.rank_experts):
            y[..., start:stop] += update(rows).view(*y.shape[:-1], -1)
        return y

    def __getattr__(self, name: str) -> Any:
        if name == "method":  # while it is being copied, before it has one
            raise AttributeError(name)
        return getattr(self.method, name)


class RankExpertsLoader(DefaultModelLoader):
    """Loads a model as vLLM does, and an adapter into it.

    Args:
        load_config: vLLM's, with the adapter's folder in model_loader_extra_config.

    Raises:
        ValueError: No adapter is named, or it is bad.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        if not isinstance(adapter := extra.pop("adapter", None), str) or not adapter:
            raise ValueError(
                f"--load-format {FORMAT} needs the adapter's folder: --model-loader-extra-config "
                '\'{"adapter": "my-adapter"}\', or "my-adapter?task=rte" for one task.'
            )
        folder, self.task = split_task(adapter)
        self.files = read_adapter_files(folder)
        self.served = served_layers(self.files, self.task)
        load_config = copy.copy(load_config)
        load_config.load_format, load_config.model_loader_extra_config = "auto", extra
        super().__init__(load_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Load a model and add the adapter to its layers.

        Raises:
            ValueError: The adapter does not fit the model, or adapts what cannot be adapted here.
        """
        model = super().load_model(vllm_config, model_config, prefix)
        add_updates(model, self.files, self.served, model_config.dtype)
        return model


def add_updates(model: nn.Module, files: AdapterFiles, served: dict[str, ServedLayer], dtype: torch.dtype) -> None:
    """Add an adapter's updates to the layers of a model of vLLM's, after everything has been checked.

    Args:
        model: Loaded.
        files: The adapter, for messages.
        served: Its layers, by transformers' names.
        dtype: The model's.

    Raises:
        ValueError: See `RankExpertsLoader.load_model`.
    """
    served = renamed(served, model)
    packed = get_packed_modules_mapping(model)
    absent = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer))
    left = {name for name in served if not f"{name}.".startswith(absent or ("\0",))}
    found: list[tuple[LinearBase, list[tuple[tuple[int, int], Update]]]] = []
    names: list[str] = []
    for path, linear in model.named_modules():
        if not isinstance(linear, LinearBase):
            continue
        parent, dot, leaf = path.rpartition(".")
        children = [f"{parent}{dot}{child}" for child in packed.get(leaf, [])] or [path]
        names += children
        if left.isdisjoint(children):
            continue
        if type(linear) not in _SERVED:
            raise ValueError(f"{files.folder} adapts {path}, a {type(linear).__name__}, which is not served.")
        found.append((linear, list(_updates(files, linear, children, served, dtype))))
        left -= set(children)
    if left:
        raise ValueError(
            f"{files.folder} adapts {', '.join(sorted(left)[:3])}, no linear layers of {type(model).__name__} in "
            "vLLM. Is this the model that the adapter was trained on?"
        )
    check_complete(files, served, names)
    for linear, updates in found:
        linear.rank_experts = nn.ModuleList(update for _, update in updates)
        linear.quant_method = AdaptedMethod(linear.quant_method, [place for place, _ in updates])
        linear.requires_unquantized_input = True  # as vLLM's LoRA layers say of themselves


def _updates(files: AdapterFiles, linear: LinearBase, children: list[str], served: dict[str, ServedLayer], dtype: Any):
    # Yields where in the layer's own output each update goes, and the update.
    full, own = part_sizes(linear), _own_sizes(linear)
    if len(children) not in (1, len(full)):
        raise ValueError(
            f"{files.folder} adapts {children[0]}, one of {len(children)} layers in one of {len(full)} parts, which is "
            "not served."
        )
    groups = [[i] for i in range(len(full))] if len(children) == len(full) else [list(range(len(full)))]
    splits_input = isinstance(linear, RowParallelLinear) and linear.tp_size > 1
    columns = None
    if splits_input:
        width = linear.input_size_per_partition
        columns = slice(linear.tp_rank * width, (linear.tp_rank + 1) * width)
    device = next(linear.parameters()).device
    start = 0
    for child, parts in zip(children, groups):
        stop = start + sum(own[i] for i in parts)
        if child in served:
            check_shapes(files, child, served[child], linear.input_size, sum(full[i] for i in parts))
            rows = torch.cat([_own_rows(linear, full, own, i, first=parts[0]) for i in parts])
            yield (start, stop), Update(served[child], rows, columns, dtype, device)
        start = stop


def _own_sizes(linear: LinearBase) -> list[int]:
    # The outputs of the parts in this process.
    if isinstance(linear, QKVParallelLinear):
        keys = linear.num_kv_heads
        return [linear.num_heads * linear.head_size, keys * linear.head_size, keys * linear.v_head_size]
    if isinstance(linear, ColumnParallelLinear):
        return list(linear.output_partition_sizes)
    return part_sizes(linear)


def _own_rows(linear: LinearBase, full: list[int], own: list[int], i: int, first: int) -> Tensor:
    # Rows of B, whose part `first` comes first, that are part i's in this process.
    if full[i] == own[i]:
        shard = 0
    elif isinstance(linear, QKVParallelLinear) and i > 0:
        shard = linear.tp_rank // linear.num_kv_head_replicas
    else:
        shard = linear.tp_rank
    return torch.arange(own[i]) + sum(full[first:i]) + shard * own[i]


def register() -> None:
    """Register the loader with vLLM."""
    register_model_loader(FORMAT)(RankExpertsLoader)
