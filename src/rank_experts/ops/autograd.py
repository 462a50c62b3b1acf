"""The op as one autograd function around a backend, and MoRE's gate as another.

A backward that must itself be differentiated (create_graph) computes the same derivative from the plain formula, with
the choice that forward made.

Shapes as in `operands.py`; T tasks, e numbers in a task's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.task import TaskGate
from ..routing.token import SMALLEST_KEY, TokenGate
from .backends import Backend, cpu
from .backends.gate import divides, weights
from .backends.pytorch import gate_rows, no_autocast
from .operands import Base, Kept, Needed, Operands


def update(base: Base, op: Operands, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """Return base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ, differentiable, and a token gate's chosen experts (N, k)."""
    tensors = op.tensors()
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if recorded and base.weight is not None and _casts_nothing(base.weight, op.x):
        return Update.apply(base.weight, *tensors, op, base, backend)
    y = base.apply(op.x)
    if recorded or (torch.is_grad_enabled() and y.requires_grad):
        fresh = base.fresh and _may_overwrite(y)
        return Update.apply(y, *tensors, op, Base(base.apply, fresh=fresh), backend)
    with no_autocast(y):
        return backend.forward(op, y, base.fresh)[:2]


class Update(torch.autograd.Function):
    """`update` with its derivative. `tensor` is the base layer's weight where `base` has it, else its output."""

    @staticmethod
    def forward(ctx: Any, tensor, x, dropped, A, B, gate, bias, op, base, backend):
        """Compute y and the chosen experts, and save the operands and `Kept`."""
        joined = base.weight is not None
        y = base.apply(x) if joined else tensor
        if joined and y._is_view():
            # Of a function's output that is a view, as layers return it for (B, L, d), autograd forbids changes in
            # place.
            y = torch.ops.aten._unsafe_view(y, y.shape)
        with no_autocast(x):
            y, indices, kept = backend.forward(op, y, joined or base.fresh)
        is_token = isinstance(op.gate, TokenGate)
        # The bias moves between steps; where it is part of the gates, backward needs it as it was.
        bias = bias.clone() if is_token and op.gate.biased_gates else None
        x = x if is_token or dropped is None else None
        ctx.save_for_backward(tensor if joined else None, x, dropped, A, B, gate, bias, *kept)
        ctx.op, ctx.transposed, ctx.backend = op.with_tensors(*[None] * 6), base.transposed, backend
        if y is tensor:
            ctx.mark_dirty(y)
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return y, indices

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the base layer's output, x, dropped, A, B and the gate's tensor."""
        if dy is None:
            return (None,) * 10
        weight, *tensors = ctx.saved_tensors
        op, kept, needed = ctx.op.with_tensors(*tensors[:6]), Kept(*tensors[6:]), Needed(*ctx.needs_input_grad[1:6])
        dtensor = dy if weight is None and ctx.needs_input_grad[0] else None
        with no_autocast(dy):
            dx = None
            if needed.x and weight is not None:
                dx = dy.reshape(-1, dy.shape[-1]) @ (weight.t() if ctx.transposed else weight)
            if torch.is_grad_enabled():
                dx, *found = _second_order(op, kept, dy, dx)
            else:
                dx, *found = ctx.backend.backward(op, kept, dy, dx, needed)
        dx, ddropped = (each if each is None else each.view(op.source.shape) for each in (dx, found[0]))
        return dtensor, dx, ddropped, *found[1:], *(None,) * 4


def task_gates(task_gate: TaskGate, task_ids: Tensor) -> Tensor:
    """Return `TaskGate.route`'s gates (G, q) of the q ≤ r ranks that are used, by the native kernel."""
    tensors = task_gate[:3]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return TaskGates.apply(*tensors, task_ids, task_gate.rank_scaling)
    return cpu.task_gates(task_gate, task_ids)[0]


class TaskGates(torch.autograd.Function):
    """`task_gates` with its derivative."""

    @staticmethod
    def forward(ctx: Any, embedding, weight, bias, task_ids, rank_scaling):
        """Compute the gates, and save the gate's numbers."""
        gates, *choice = cpu.task_gates(TaskGate(embedding, weight, bias, rank_scaling), task_ids)
        ctx.save_for_backward(embedding, weight, bias, task_ids, *choice)
        ctx.rank_scaling = rank_scaling
        ctx.set_materialize_grads(False)
        return gates

    @staticmethod
    def backward(ctx: Any, dgates: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of embedding, weight and bias."""
        if dgates is None:
            return (None,) * 5
        embedding, weight, bias, task_ids, probabilities, best = ctx.saved_tensors
        task_gate = TaskGate(embedding, weight, bias, ctx.rank_scaling)
        if torch.is_grad_enabled():
            found = _differentiable(task_gate.route(task_ids).gates[:, : dgates.shape[1]], dgates, task_gate[:3])
        else:
            choice, needed = (probabilities, best), ctx.needs_input_grad[:3]
            found = cpu.task_gates_backward(task_gate, task_ids, choice, dgates, needed)
        return *found, None, None


def _second_order(op: Operands, kept: Kept, dy: Tensor, dx: Tensor | None) -> list[Tensor | None]:
    # The gradients of x, dropped, A, B and the gate's tensor, with a graph of their own: from the plain formula, with
    # the choice that forward made.
    gates, (A, B) = op.gate, op.used()
    if isinstance(gates, TokenGate):
        gates = _chosen_gates(op.x, gates, kept, len(A))
    u = F.linear(op.source.reshape(-1, op.source.shape[-1]).to(op.dtype), A.to(op.dtype))
    u = u * op.scale if gates is None else u * gate_rows(gates * op.scale, u)
    found = _differentiable(F.linear(u, B.to(op.dtype)), dy.reshape(-1, dy.shape[-1]), op.tensors()[:5])
    if dx is not None:
        found[0] = dx if found[0] is None else dx + found[0].reshape(dx.shape)
    return found


def _chosen_gates(x: Tensor, token: TokenGate, kept: Kept, num_ranks: int) -> Tensor:
    # The gates (N, r) of the experts that forward chose.
    assert kept.indices is not None
    indices = kept.indices.long()
    values = token.logits(x.reshape(-1, x.shape[-1])).gather(1, indices)
    if token.score_function == "sigmoid":
        values = values.sigmoid() if token.biased_gates else F.logsigmoid(values)
    if token.biased_gates:
        values = values + token.balance_bias[indices]
    if divides(token):
        values = values.clamp(min=SMALLEST_KEY)
    gates = weights(values, token) * token.top_k
    spread = torch.zeros(len(gates), len(token.weight), dtype=gates.dtype, device=x.device)
    return spread.scatter(1, indices, gates).repeat_interleave(num_ranks // len(token.weight), 1)


def _differentiable(y: Tensor, dy: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    # The gradients of the tensors that need them, with a graph of their own.
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    if not wanted:
        return [None] * len(tensors)
    gradients = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(gradients) if tensor is not None and tensor.requires_grad else None for tensor in tensors]


def _casts_nothing(weight: Tensor, x: Tensor) -> bool:
    # Whether the base layer computes in x's own dtype.
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    return weight.dtype == x.dtype and (not autocast or torch.get_autocast_dtype(x.device.type) == x.dtype)


def _may_overwrite(y: Tensor) -> bool:
    # Autograd allows neither for a function with two outputs, nor for a parameter.
    return not y._is_view() and not (y.is_leaf and y.requires_grad)
