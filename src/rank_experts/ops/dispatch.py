"""The one place that decides how an adapted layer is computed, and says once what it chose."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ..routing import Routing, TaskRouter, TokenRouter, expert_load
from . import gate as torch_gate
from . import native, native_given
from .announcement import announce
from .fused import Base, given_gates, token_gated
from .gate import GateSpec
from .reference import rank_experts_reference
from .shared import Reader, Shared, project
from .task import task_gated

# Below this many tokens, grouping the products of layers that read one input costs what it saves, as measured on a CPU
# (examples/benchmarks/shared.py): it pays from fewer tokens on for a token router in 16 bits than for the rest.
_SHARED_TOKENS = 512
_SHARED_TOKENS_OTHERWISE = 2048
_PLAIN = native.PLAIN
_CHOICES = {
    "gate": "fused function, gate in PyTorch",
    "triton_kernels": "fused function, gate in Triton",
    "native": "native CPU kernel",
}


class Adapted(NamedTuple):
    """What the op returns.

    Attributes:
        y: (…, d_out) base output plus update.
        indices: (N, k) chosen experts; None without a token router, or where they were not wanted.
        routing: The whole `Routing` where it was asked for; None otherwise.
    """

    y: Tensor
    indices: Tensor | None = None
    routing: Routing | None = None


def rank_experts(
    base_layer: nn.Module,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: TokenRouter | TaskRouter | Tensor | None = None,
    *,
    task_ids: Tensor | None = None,
    scale: float = 1.0,
    dropout: Callable[[Tensor], Tensor] | None = None,
    output: Tensor | None = None,
    want_routing: bool = False,
    shared: Shared | None = None,
) -> Adapted:
    """Compute base(x) + s · (g ⊙ (dropout(x) Aᵀ)) Bᵀ by the fastest implementation that serves the case.

    The plain reference is taken for export and functional transforms, for tensors that are not plain ones, and where
    the whole routing is wanted; else the fused function, with Triton kernels where they run; under `torch.compile` the
    same as one node of the graph. All select the same experts for the same logits.

    Args:
        base_layer: The frozen layer.
        x: (…, d_in).
        A: (r, d_in).
        B: (d_out, r).
        gate: A token router; a task router; gates (G, r), a row for N / G tokens in turn; or None where all are 1.
        task_ids: (G,) int64 in 0 … T − 1, for a task router: a task for N / G tokens in turn.
        scale: s.
        dropout: Applied to the x that A reads; None: nothing.
        output: (…, d_out) what the update is added to where the base layer was applied already.
        want_routing: Return the router's gates, choices and probabilities, differentiable.
        shared: The layer's part of what `share` returned for x; neither with dropout nor with `want_routing`.

    Returns:
        Adapted: y in the base output's dtype.

    Example:
        >>> A, B = torch.ones(2, 4), torch.ones(3, 2)
        >>> rank_experts(nn.Linear(4, 3), torch.ones(5, 4), A, B, scale=0.5).y.shape
        torch.Size([5, 3])
    """
    if (
        isinstance(gate, TokenRouter)
        and dropout is None
        and output is None
        and not want_routing
        and (decoded := decode(base_layer, x, A, B, gate, scale)) is not None
    ):
        return decoded
    autocast = torch.is_autocast_enabled(x.device.type)
    # As in PEFT's LoRA: autocast decides, and without it the adapter computes in its own dtype.
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else A.dtype
    dropped = dropout(x if autocast else x.to(A.dtype)) if dropout is not None else None
    reason = _needs_reference(x, A, B, gate, autocast, want_routing)
    joined, routing = None, None  # A task router that the op runs itself, and what another chose.
    if isinstance(gate, TaskRouter):
        assert task_ids is not None
        if not reason and shared is None and _joins_task_gate(gate, x, A, B, dtype):
            joined, gate = gate, None
        else:
            routing = gate(task_ids)
            gate, A, B = _used_ranks(routing, A, B)
    if reason:
        if not torch.compiler.is_compiling():
            announce(f"plain PyTorch, because {reason}")
        return _reference(base_layer, x, A, B, gate, scale, dropped, output, routing)
    if torch.compiler.is_compiling():
        return _one_node(base_layer(x) if output is None else output, x, dropped, A, B, gate, scale, dtype)
    fresh = _is_plain(base_layer)
    if output is None and fresh and torch.is_grad_enabled() and _joins(base_layer, x, autocast):
        base = Base(base_layer, isinstance(base_layer, Conv1D), True, dtype)
        tensor: Tensor = base_layer.weight  # type: ignore[assignment]
    else:
        tensor = base_layer(x) if output is None else output
        base = Base(None, False, (fresh or output is not None) and _may_overwrite(tensor), dtype)
    if joined is not None and task_ids is not None:
        announce("native CPU kernel for few ranks, with the task gate")
        return Adapted(task_gated(x, dropped, tensor, A, B, joined, task_ids, scale, base))
    if not isinstance(gate, TokenRouter):
        projection = None if shared is None else shared.projection
        kernels = torch_gate if projection is not None else given_kernels(x, A, B, dtype)
        announce("native CPU kernel for few ranks" if kernels is native_given else "fused PyTorch function")
        if projection is not None and projection.shape[1] > len(A):  # The ranks that the batch's tasks use.
            projection = projection[:, : len(A)]
        return Adapted(given_gates(x, dropped, tensor, A, B, gate, scale, base, kernels, projection))
    spec = GateSpec(gate.top_k, gate.score_function, gate.biased_gates, scale)
    kernels = gate_kernels(x, A, B, gate.weight, gate.top_k, dtype)
    announce(_CHOICES[kernels.__name__.rpartition(".")[2]])
    y, indices = token_gated(x, dropped, tensor, A, B, gate.weight, gate.balance_bias, spec, base, kernels, shared)
    return Adapted(y, indices)


def decode(
    base_layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, router: TokenRouter, scale: float, want_indices: bool = True
) -> Adapted | None:
    """Apply a layer with a token gate to a few tokens without gradients by the native kernel, where that serves.

    `rank_experts` tries it first. It is apart for a layer that decodes: by then the base layer's weight has pushed
    everything else out of the processor's caches, so that each line of Python costs ten times what it costs in a loop.

    Args:
        base_layer: The frozen layer.
        x: (…, d_in).
        A: (r, d_in).
        B: (d_out, r).
        router: The gate.
        scale: s.
        want_indices: Return the choice too.

    Returns:
        What `rank_experts` returns; None where that is to be asked.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()  # as it is where a layer is exported
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or not _is_plain(base_layer)
        or (decoded := native.decode(base_layer, x, A, B, router, scale, want_indices)) is None
    ):
        return None
    announce("native CPU kernel")
    return Adapted(*decoded)


def load_of_output(y: Tensor, indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Count how many tokens chose each expert, of those that mean something.

    A NaN in a token makes all of its output NaN, and its choice of experts means nothing.

    Args:
        y: (…, d_out) an adapted layer's output.
        indices: (N, k) int64, the chosen experts.
        num_experts: E.
        mask: (N,) true where a token counts; None: all do.

    Returns:
        (E,) float32.

    Example:
        >>> load_of_output(torch.tensor([[1.0], [torch.nan]]), torch.tensor([[0], [1]]), num_experts=2)
        tensor([1., 0.])
    """
    traced = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    if not traced and (load := native.count_load(y, indices, num_experts, mask)) is not None:
        return load
    if not traced and y.is_cuda and type(y) in _PLAIN and num_experts <= 256 and (kernels := triton_kernels()):
        return kernels.count_load(y, indices, num_experts, mask)
    valid = ~y.detach().reshape(-1, y.shape[-1])[:, 0].isnan()
    return expert_load(indices, num_experts, valid if mask is None else mask & valid)


def has_enough_to_share(x: Tensor) -> bool:
    """Say whether any layer might share its products with x (…, d_in); cheaper than `may_share`, for decoding."""
    return x.numel() >= min(_SHARED_TOKENS, _SHARED_TOKENS_OTHERWISE) * x.shape[-1]


def may_share(x: Tensor, reader: Reader) -> bool:
    """Say whether a layer's products with x (…, d_in) are worth computing together with other layers'.

    Not for few tokens, where grouping costs more than it saves; nor where the native kernel multiplies only what a
    token chose.
    """
    matrices = [matrix for matrix in reader[:3] if isinstance(matrix, Tensor)]
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else reader.A.dtype
    early = reader.weight is not None and dtype.itemsize == 2
    enough = _SHARED_TOKENS if early else _SHARED_TOKENS_OTHERWISE
    if x.numel() < enough * x.shape[-1] or not {type(x), *map(type, matrices)} <= _PLAIN:
        return False
    # What another library has moved away or taken apart (offloading, sharding) is not ours to gather.
    if any(matrix.device != x.device or matrix.is_meta or not matrix.numel() for matrix in matrices):
        return False
    if torch._C._are_functorch_transforms_active() or (autocast and x.dtype == torch.float64):
        return False
    if reader.weight is None:
        return given_kernels(x, reader.A, reader.B, dtype) is not native_given
    return gate_kernels(x, reader.A, reader.B, reader.weight, reader.top_k, dtype) is not native


def share(x: Tensor, readers: list[Reader]) -> list[Shared] | None:
    """Compute the products of x with the A and W_g of several layers together.

    Args:
        x: (…, d_in).
        readers: The layers', each of which `may_share`.

    Returns:
        A share for each, or None where it takes two to share.
    """
    kinds = {reader.A.dtype for reader in readers}
    if len(readers) < 2 or len(kinds) > 1:
        return None
    announce("one product for layers that read the same input")
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else kinds.pop()
    matrices = [(reader.A, dtype) for reader in readers]
    for reader in readers:
        if reader.weight is not None:
            wide = torch.promote_types(torch.promote_types(x.dtype, reader.weight.dtype), torch.float32)
            matrices.append((reader.weight, wide))
    found = project(x, matrices, dtype)
    logits = iter(found[len(readers) :])
    return [Shared(z, None if reader.weight is None else next(logits)) for reader, z in zip(readers, found)]


def _needs_reference(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: TokenRouter | TaskRouter | Tensor | None,
    autocast: bool,
    want_routing: bool,
) -> str:
    # Why only the reference serves, or an empty string.
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "the layer is being exported"
    if want_routing:
        return "the router's probabilities are wanted"
    weight = gate.weight if isinstance(gate, TokenRouter) else A
    if not {type(x), type(A), type(B), type(weight)} <= _PLAIN:
        return "a tensor is of a subclass"
    if torch._C._are_functorch_transforms_active():
        return "a functional transform is active"
    if x.is_meta:
        return "the tensors hold no data"
    if autocast and x.dtype == torch.float64:
        return "autocast leaves float64 alone"
    return ""


def _joins_task_gate(router: TaskRouter, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> bool:
    # Whether the gate may be computed with the update: nothing else sees the router run, and a kernel takes it all.
    gate = (router.task_embedding, router.gate_weight, router.gate_bias)
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and type(router) is TaskRouter
        and _is_unwatched(router)
        and {type(each) for each in gate} <= _PLAIN
        and len({each.dtype for each in gate}) == 1
        and native_given.supports((x, A, B, *gate), dtype, len(A))
    )


def _used_ranks(routing: Routing, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Gates, A and B up to the last rank that the tasks use, where that is known.
    if torch.compiler.is_compiling() or not routing.indices.is_cpu:
        return routing.gates, A, B  # An accelerator would have to be waited for.
    used = int(routing.indices.max()) if len(routing.indices) else len(A)
    # Even where all are used: the order in which gradients come must not depend on a process's tasks, because
    # DeepSpeed's ZeRO-2 adds up what comes first, second, … on each.
    return routing.gates.narrow(1, 0, used), A.narrow(0, 0, used), B.narrow(1, 0, used)


def _reference(
    base_layer: nn.Module,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: TokenRouter | Tensor | None,
    scale: float,
    dropped: Tensor | None,
    output: Tensor | None,
    routing: Routing | None = None,
) -> Adapted:
    y = base_layer(x) if output is None else output
    gates = gate
    if isinstance(gate, TokenRouter):
        routing = gate(x.reshape(-1, x.shape[-1]))
        gates = routing.gates
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(A.dtype)
    source = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
    # Not len(), which makes a constant of a size that torch.export is to leave open.
    if isinstance(gates, Tensor) and gates.shape[0] not in (1, source.shape[0]):
        gates = gates.repeat_interleave(source.shape[0] // gates.shape[0], 0)
    flat = rank_experts_reference(y.reshape(-1, y.shape[-1]), source, A, B, gates, scale)  # type: ignore[arg-type]
    return Adapted(flat.reshape(y.shape), None if routing is None else routing.indices, routing)


def _one_node(
    y: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: TokenRouter | Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Adapted:
    # By name, as `node.py` has registered them: it runs what is decided here.
    op = torch.ops.rank_experts
    if not isinstance(gate, TokenRouter):
        return Adapted(op.given_gates(y, x if dropped is None else dropped, A, B, gate, scale, dtype)[0])
    constants = (gate.top_k, gate.score_function, gate.biased_gates, scale, dtype)
    y, indices, *_ = op.token_gated(y, x, dropped, A, B, gate.weight, gate.balance_bias, *constants)
    return Adapted(y, indices.long())


def _is_plain(base_layer: nn.Module) -> bool:
    # Whether nothing but the caller can hold on to the layer's output.
    return type(base_layer) in (nn.Linear, Conv1D) and _is_unwatched(base_layer)


def _is_unwatched(module: nn.Module) -> bool:
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and not torch_module._global_backward_hooks
        and not torch_module._global_backward_pre_hooks
    )


def _joins(base_layer: nn.Module, x: Tensor, autocast: bool) -> bool:
    # Whether the op may apply the (plain) layer itself: it is frozen, and nothing is cast on the way.
    weight, bias = base_layer.weight, base_layer.bias
    return (
        type(weight) in (Tensor, nn.Parameter)
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and weight.dtype == x.dtype
        and (not autocast or torch.get_autocast_dtype(x.device.type) == x.dtype)
    )


def _may_overwrite(output: Tensor) -> bool:
    # Autograd allows neither for a function with two outputs, nor for a parameter.
    return not output._is_view() and not (output.is_leaf and output.requires_grad)


def gate_kernels(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, top_k: int, dtype: torch.dtype) -> ModuleType:
    """Return `ops.gate`, or the module that serves a token gate faster."""
    if x.is_cpu and native.supports((x, A, B, weight), dtype, top_k, weight.shape[0]):
        return native
    if x.device.type == "cuda" and torch.float64 not in (x.dtype, weight.dtype) and (found := triton_kernels()):
        return found if found.supports(dtype, len(A)) else torch_gate
    return torch_gate


def given_kernels(x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> ModuleType:
    """Return `ops.gate`, which stands for PyTorch's products, or the module that serves given gates faster."""
    return native_given if x.is_cpu and native_given.supports((x, A, B), dtype, len(A)) else torch_gate


@functools.cache
def triton_kernels() -> ModuleType | None:
    """Import `ops.triton_kernels`; None where Triton is not installed. Nothing else of the library imports it."""
    if importlib.util.find_spec("triton") is None:
        announce("no Triton kernels, because Triton is not installed")
        return None
    return importlib.import_module(".triton_kernels", __package__)
