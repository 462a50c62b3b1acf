"""The one operation, base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ: its door.

Shapes: N tokens (all leading dimensions together), d_in and d_out features, r ranks, E experts, k active ones, G rows
of gates, each for N / G tokens in turn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..routing.choice import Routing
from ..routing.task import TaskGate
from ..routing.token import TokenGate, expert_load
from . import autograd, backends, compiled
from .announcement import announce
from .operands import PLAIN, Base, Operands
from .reference import reference


class Adapted(NamedTuple):
    """What the op returns.

    Attributes:
        y: (…, d_out) base output plus update.
        indices: (N, k) int64 chosen experts, best first; None without a token gate.
        routing: The whole `Routing` of a token gate where it was asked for; None otherwise.
    """

    y: Tensor
    indices: Tensor | None = None
    routing: Routing | None = None


def rank_experts(
    base: Base,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: TokenGate | Tensor | None = None,
    *,
    scale: float = 1.0,
    dropped: Tensor | None = None,
    want_routing: bool = False,
) -> Adapted:
    """Compute base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ by the fastest implementation that serves the case.

    The plain reference is taken for export and functional transforms, for tensors that are not plain ones, and where
    the whole routing is wanted; else one autograd function around a backend; under `torch.compile` the same as one
    node of the graph. All select the same experts for the same logits. Without autocast the adapter computes in A's
    dtype.

    Args:
        base: The frozen layer.
        x: (…, d_in).
        A: (r, d_in).
        B: (d_out, r).
        gate: A token gate; gates (G, q) of the first q ≤ r ranks, the others unused; or None where all are 1.
        scale: s.
        dropped: (…, d_in) x after dropout, which A reads; None: x.
        want_routing: Return a token gate's gates, choices and probabilities, differentiable.

    Returns:
        Adapted: y in the base output's dtype.

    Example:
        >>> A, B, base = torch.ones(2, 4), torch.ones(3, 2), Base(torch.nn.Linear(4, 3).forward)
        >>> rank_experts(base, torch.ones(5, 4), A, B, scale=0.5).y.shape
        torch.Size([5, 3])
    """
    compiling = torch.compiler.is_compiling()  # As it is where a layer is exported.
    autocast = (compiling or torch._C._is_any_autocast_enabled()) and torch.is_autocast_enabled(x.device.type)
    # As in PEFT's LoRA: autocast decides, and without it the adapter computes in its own dtype.
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else A.dtype
    op = Operands(x, dropped, A, B, gate, scale, dtype)
    if (reason := _needs_reference(op, compiling, autocast)) or (want_routing and isinstance(gate, TokenGate)):
        if not compiling:
            announce(f"plain PyTorch, because {reason or 'the whole routing is wanted'}")
        y, routing = reference(base.apply(x), op)
        return Adapted(y, None if routing is None else routing.indices, routing)
    if compiling:
        return Adapted(*compiled.update(base.apply(x), op))
    if not torch.is_grad_enabled() and base.fresh and (decoded := backends.decode(base, op)) is not None:
        return Adapted(*decoded)
    if isinstance(gate, Tensor):
        _check_gates(gate, op)
    backend = backends.choose(op)
    announce(backend.NAME)
    return Adapted(*autograd.update(base, op, backend))


def task_gates(gate: TaskGate, task_ids: Tensor) -> Tensor:
    """Return the gates of tasks, of no more ranks than they use where that is known without waiting.

    Args:
        gate: A task gate of r ranks.
        task_ids: (G,) int64 in 0 … T − 1.

    Returns:
        (G, q), differentiable; q ≤ r.
    """
    if not _is_traced() and backends.cpu.serves_task_gate(gate):
        return autograd.task_gates(gate, task_ids)
    routing = gate.route(task_ids)
    if torch.compiler.is_compiling() or not routing.indices.is_cpu or not len(routing.indices):
        return routing.gates  # An accelerator would have to be waited for.
    return routing.gates.narrow(1, 0, int(routing.indices.max()))


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
    if not _is_traced() and type(y) in PLAIN and (load := backends.count(y, indices, num_experts, mask)) is not None:
        return load
    valid = ~y.detach().reshape(-1, y.shape[-1])[:, 0].isnan()
    return expert_load(indices, num_experts, valid if mask is None else mask & valid)


def _needs_reference(op: Operands, compiling: bool, autocast: bool) -> str:
    # Why only the reference serves, or an empty string.
    if torch.compiler.is_exporting() if compiling else torch._C._is_tracing():
        return "the layer is being exported"
    if torch._C._are_functorch_transforms_active():
        return "a functional transform is active"
    for tensor in op.tensors():
        if tensor is not None and type(tensor) not in PLAIN:
            return "a tensor is of a subclass"
    if autocast and op.x.dtype == torch.float64:
        return "autocast leaves float64 alone"
    return ""


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def _check_gates(gates: Tensor, op: Operands) -> None:
    num_tokens, num_ranks = op.x.numel() // op.A.shape[1], op.A.shape[0]
    fits = gates.dim() == 2 and gates.shape[1] <= num_ranks
    if not fits or (num_tokens and (not len(gates) or num_tokens % len(gates))):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)} for {num_tokens} tokens and {num_ranks} ranks: "
            f"expected (G, q), q ≤ {num_ranks}, a row for as many tokens each."
        )
