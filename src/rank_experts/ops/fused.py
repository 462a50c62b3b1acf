"""The op as one autograd function each for token gates and for given gates: fewer passes, little saved.

What it does that a chain of PyTorch ops does not: the update is accumulated in the base layer's output and in the
gradient that the base layer sends back, in place, by the products that compute it; x · [A; W_g]ᵀ and its derivative
are one product each; the scale lies in the gates; of the gate, backward keeps `Chosen` and recomputes the rest.

A backward that must itself be differentiated (create_graph) computes the same derivative from the plain formula.

Shapes: N tokens (all leading dimensions together), d_in and d_out features, r ranks, E experts, G gates' rows, each
for N / G tokens in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gate as torch_gate
from .gate import Chosen, GateSpec
from .products import (
    Base,
    base_backward,
    given_backward,
    given_forward,
    no_autocast,
    output_gradient,
    projection_backward,
    token_backward,
    token_forward,
)
from .second_order import differentiable, given_update, token_update
from .shared import Shared


def token_gated(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    spec: GateSpec,
    base: Base,
    kernels: Any = torch_gate,
    shared: Shared | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute base(x) + s · (g ⊙ (dropped Aᵀ)) Bᵀ with a token gate.

    Args:
        x: (…, d_in) the layer's input, which the base layer and the router read.
        dropped: x after dropout, for A; None: x.
        tensor: The base layer's weight, or its output (…, d_out) where `base.layer` is None.
        A: (r, d_in).
        B: (d_out, r).
        weight: (E, d_in) W_g.
        balance_bias: (E,) b.
        spec: The gate.
        base: The base layer.
        kernels: `ops.gate` or a module with the same functions.
        shared: x's products with A and W_g, where several layers share them; not with dropout.

    Returns:
        y (…, d_out), and the chosen experts (N, k).
    """
    inputs = (x, dropped, tensor, A, B, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return TokenGated.apply(*inputs, balance_bias, spec, base, kernels, *(shared or (None, None)))
    y, indices, _ = token_forward(*inputs, balance_bias, spec, base, kernels, False, shared)
    return y, indices


def given_gates(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor | None,
    scale: float,
    base: Base,
    kernels: Any = torch_gate,
    shared: Tensor | None = None,
) -> Tensor:
    """Compute base(x) + s · (g ⊙ (dropped Aᵀ)) Bᵀ with gates (G, r), or None where all are 1; else as `token_gated`."""
    inputs = (x, dropped, tensor, A, B, gates)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return GivenGates.apply(*inputs, scale, base, kernels, shared)
    return given_forward(*inputs, scale, base, kernels, shared)[0]


class TokenGated(torch.autograd.Function):
    """`token_gated` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x, dropped, tensor, A, B, weight, balance_bias, spec, base, kernels, projection, logits):
        """Compute y and the chosen experts, and save x and `Chosen`."""
        shared = None if projection is None else (projection, logits)
        y, indices, chosen = token_forward(
            x, dropped, tensor, A, B, weight, balance_bias, spec, base, kernels, True, shared
        )
        _save(
            ctx, base, tensor, y, x, dropped, A, B, weight, balance_bias.clone() if spec.biased_gates else None, *chosen
        )
        ctx.spec, ctx.base, ctx.kernels, ctx.shared = spec, base, kernels, shared is not None
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return y, indices

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, tensor, A, B, weight, and of what is shared."""
        if dy is None:
            return (None,) * 12
        base_weight, x, dropped, A, B, weight, balance_bias, *saved = ctx.saved_tensors
        chosen, spec, base = Chosen(*saved), ctx.spec, ctx.base
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            update = token_update(x, dropped, A, B, weight, balance_bias, chosen, spec, base)
            # All of the derivative here: what is shared is computed from x, A and W_g, and gets none.
            return (*differentiable(update, dy, base_weight, (x, dropped, A, B, weight), needed, base), *(None,) * 6)
        if ctx.shared:
            with no_autocast(x):
                dx = base_backward(dy, base_weight, base) if needed[0] else None
                dx = None if dx is None else dx.view(x.shape)
                narrow, narrow_B = dy.reshape(-1, dy.shape[-1]).to(base.dtype), B.to(base.dtype)
                both, dB = ctx.kernels.backward(narrow, narrow_B, chosen, balance_bias, spec, len(weight))
                dB = dB.to(B.dtype).t().contiguous() if needed[4] else None
            dshared = both.split([len(A), len(weight)], 1)
            return dx, None, output_gradient(dy, base, needed), None, dB, *(None,) * 5, *dshared
        dx, ddropped, dA, dB, dweight = token_backward(
            dy, base_weight, x, dropped, A, B, weight, balance_bias, chosen, spec, base, ctx.kernels, needed
        )
        return dx, ddropped, output_gradient(dy, base, needed), dA, dB, dweight, *(None,) * 6


class GivenGates(torch.autograd.Function):
    """`given_gates` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x, dropped, tensor, A, B, gates, scale, base, kernels, shared):
        """Compute y, and save x and what `given_forward` says."""
        y, saved = given_forward(x, dropped, tensor, A, B, gates, scale, base, kernels, shared)
        _save(ctx, base, tensor, y, x if dropped is None else None, dropped, A, B, gates, saved)
        ctx.scale, ctx.base, ctx.kernels, ctx.shape, ctx.shared = scale, base, kernels, x.shape, shared is not None
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, tensor, A, B, gates, and of what is shared."""
        if dy is None:
            return (None,) * 10
        base_weight, x, dropped, A, B, gates, projection = ctx.saved_tensors
        base, scale, needed = ctx.base, ctx.scale, ctx.needs_input_grad
        if torch.is_grad_enabled():
            update = given_update(x, dropped, A, B, gates, scale, base)
            inputs = (x, dropped, A, B, gates)
            dx, *rest = differentiable(update, dy, base_weight, inputs, needed, base)
            return (dx, *rest, *(None,) * 4)
        if ctx.shared:
            with no_autocast(x):
                dx = base_backward(dy, base_weight, base) if needed[0] else None
                dp, dB, dgates = projection_backward(dy, B, gates, projection, scale, base, needed)
            dx = None if dx is None else dx.view(ctx.shape)
            return dx, None, output_gradient(dy, base, needed), None, dB, dgates, None, None, None, dp
        dx, ddropped, dA, dB, dgates = given_backward(
            dy, base_weight, x, dropped, A, B, gates, projection, scale, base, ctx.kernels, needed
        )
        if dx is not None:
            dx = dx.view(ctx.shape)
        return dx, ddropped, output_gradient(dy, base, needed), dA, dB, dgates, *(None,) * 4


def _save(ctx: Any, base: Base, tensor: Tensor, y: Tensor, *tensors: Tensor | None) -> None:
    # The base layer's weight is what its input's gradient needs; an output that the op was given is not kept.
    ctx.save_for_backward(None if base.layer is None else tensor, *tensors)
    if y is tensor:
        ctx.mark_dirty(y)
