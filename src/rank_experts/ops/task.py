"""The op with MoRE's task gate by the native CPU kernel: gate and update are one autograd function.

On its own the gate is a few dozen numbers a layer and some sixty launches, which cost more than the update of a few
hundred tokens. What the batch's tasks do not use of A and B is neither multiplied nor cut out.

Shapes as in `products.py`; T tasks, e numbers in a task's embedding, G task ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routing import TaskRouter, task_logits, task_routing
from . import native_given
from .products import Base, base_backward, base_output, no_autocast, output_gradient
from .second_order import differentiable, given_update


def task_gated(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    router: TaskRouter,
    task_ids: Tensor,
    scale: float,
    base: Base,
) -> Tensor:
    """Compute base(x) + s · (g ⊙ (dropped Aᵀ)) Bᵀ with a task gate.

    Args:
        x: (…, d_in) the layer's input.
        dropped: x after dropout, for A; None: x.
        tensor: The base layer's weight, or its output (…, d_out) where `base.layer` is None.
        A: (r, d_in).
        B: (d_out, r).
        router: The gate.
        task_ids: (G,) int64, a task for N / G tokens in turn.
        scale: s.
        base: The base layer.

    Returns:
        y (…, d_out).
    """
    gate = (router.task_embedding, router.gate_weight, router.gate_bias)
    inputs = (x, dropped, tensor, A, B, *gate)
    constants = (task_ids, router.rank_scaling, scale, base)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return TaskGated.apply(*inputs, *constants)
    return _forward(*inputs, *constants)[0]


class TaskGated(torch.autograd.Function):
    """`task_gated` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x, dropped, tensor, A, B, embedding, weight, bias, task_ids, scaling, scale, base):
        """Compute y, and save x, the projections that are used, and the gate's numbers."""
        y, *saved = _forward(x, dropped, tensor, A, B, embedding, weight, bias, task_ids, scaling, scale, base)
        source = x if dropped is None else None
        base_weight = None if base.layer is None else tensor
        ctx.save_for_backward(base_weight, source, dropped, A, B, embedding, weight, bias, task_ids, *saved)
        if y is tensor:
            ctx.mark_dirty(y)
        ctx.scaling, ctx.scale, ctx.base, ctx.shape = scaling, scale, base, x.shape
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, tensor, A, B, embedding, weight and bias."""
        if dy is None:
            return (None,) * 12
        base_weight, x, dropped, A, B, *gate, task_ids, projections, gates, probabilities, best = ctx.saved_tensors
        embedding, weight, bias = gate
        base, scale, needed = ctx.base, ctx.scale, ctx.needs_input_grad
        if torch.is_grad_enabled():
            used = projections.shape[1]
            logits = task_logits(embedding, weight, bias, task_ids)
            gates = task_routing(logits, len(embedding), ctx.scaling).gates.narrow(1, 0, used)
            update = given_update(x, dropped, A.narrow(0, 0, used), B.narrow(1, 0, used), gates, scale, base)
            inputs = (x, dropped, A, B, embedding, weight, bias)
            return *differentiable(update, dy, base_weight, inputs, needed, base), *(None,) * 4
        source = x if dropped is None else dropped
        with no_autocast(source):
            dx = base_backward(dy, base_weight, base) if needed[0] else None
            asked = (*needed[:5], any(needed[5:8]))
            dx, ddropped, dA, dB, dgates = native_given.backward(
                dx, dy, x, dropped, A, B, gates, projections, scale, asked
            )
            gradients: tuple[Tensor | None, ...] = (None, None, None)
            if dgates is not None:
                gradients = native_given.task_gates_backward(
                    dgates,
                    projections.shape[1],
                    probabilities,
                    best,
                    (embedding, weight, bias),
                    task_ids,
                    ctx.scaling,
                    needed[5:8],
                )
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, ddropped, output_gradient(dy, base, needed), dA, dB, *gradients, *(None,) * 4


def _forward(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_ids: Tensor,
    scaling: str,
    scale: float,
    base: Base,
) -> tuple[Tensor, ...]:
    # y, the projections that are used, the gates, and what the gate's backward needs.
    y = base_output(x, tensor, base)
    with no_autocast(x):
        gates, used, *choice = native_given.task_gates((embedding, weight, bias), task_ids, scaling)
        y, projections = native_given.forward(x, dropped, y, A, B, gates, used, scale, base)
    return y, projections, gates, *choice
