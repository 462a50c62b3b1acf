"""The op as one autograd function each for token gates and for given gates: fewer passes, little saved.

What it does that a chain of PyTorch ops does not: the update is accumulated in the base layer's output and in the
gradient that the base layer sends back, in place, by the products that compute it; x · [A; W_g]ᵀ and its derivative
are one product each; the scale lies in the gates; of the gate, backward keeps `Chosen` and recomputes the rest.

A backward that must itself be differentiated (create_graph) computes the same derivative from the plain formula.

Shapes: N tokens (all leading dimensions together), d_in and d_out features, r ranks, E experts, G gates' rows, each
for N / G tokens in turn.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gate as torch_gate
from .gate import Chosen, GateSpec

# Below this many tokens two products cost less than putting A and W_g into one matrix.
_FEW_TOKENS = 32


class Base(NamedTuple):
    """The frozen layer to whose output the update is added.

    Attributes:
        layer: Applied by the op, and its backward with it; None: `tensor` is its output already.
        transposed: Its weight is (d_in, d_out), as in transformers' Conv1D.
        in_place: The output may be overwritten.
        dtype: What the adapter's two products are computed in.
    """

    layer: nn.Module | None
    transposed: bool
    in_place: bool
    dtype: torch.dtype


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

    Returns:
        y (…, d_out), and the chosen experts (N, k).
    """
    inputs = (x, dropped, tensor, A, B, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return TokenGated.apply(*inputs, balance_bias, spec, base, kernels)
    y, indices, _ = _token_forward(*inputs, balance_bias, spec, base, kernels, False)
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
) -> Tensor:
    """Compute base(x) + s · (g ⊙ (dropped Aᵀ)) Bᵀ with gates (G, r), or None where all are 1; else as `token_gated`."""
    inputs = (x, dropped, tensor, A, B, gates)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return GivenGates.apply(*inputs, scale, base)
    return _given_forward(*inputs, scale, base)[0]


class TokenGated(torch.autograd.Function):
    """`token_gated` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x, dropped, tensor, A, B, weight, balance_bias, spec, base, kernels):
        """Compute y and the chosen experts, and save x and `Chosen`."""
        y, indices, chosen = _token_forward(x, dropped, tensor, A, B, weight, balance_bias, spec, base, kernels, True)
        _save(
            ctx, base, tensor, y, x, dropped, A, B, weight, balance_bias.clone() if spec.biased_gates else None, *chosen
        )
        ctx.spec, ctx.base, ctx.kernels = spec, base, kernels
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return y, indices

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, tensor, A, B and weight."""
        if dy is None:
            return (None,) * 10
        base_weight, x, dropped, A, B, weight, balance_bias, *saved = ctx.saved_tensors
        chosen, spec, base = Chosen(*saved), ctx.spec, ctx.base
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            update = _token_update(x, dropped, A, B, weight, balance_bias, chosen, spec, base)
            return (*_differentiable(update, dy, base_weight, (x, dropped, A, B, weight), needed, base), *(None,) * 4)
        with _no_autocast(x):
            num_experts, num_ranks = weight.shape[0], A.shape[0]
            flat = dy.reshape(-1, dy.shape[-1])
            narrow, narrow_B = flat.to(base.dtype), B.to(base.dtype)
            both, dB = ctx.kernels.backward(narrow, narrow_B, chosen, balance_bias, spec, num_experts)
            dB = dB.to(B.dtype).t().contiguous() if needed[4] else None
            dx = _base_backward(flat, base_weight, base) if needed[0] else None
            if dropped is None:
                dx = _accumulate(dx, both, torch.cat([A, weight]), x, base) if needed[0] else None
                dA, dweight = _weight_gradients(both, x, A, weight, needed[3], needed[5], base)
                return dx, None, _like(dy, base, needed), dA, dB, dweight, None, None, None, None
            dp, dz = both[:, :num_ranks], both[:, num_ranks:]
            dx = _accumulate(dx, dz, weight, x, base) if needed[0] else None
            ddropped = _accumulate(None, dp, A, dropped, base) if needed[1] else None
            dA = _product(dp, dropped, A, base) if needed[3] else None
            dweight = _product(dz, x, weight, base) if needed[5] else None
            return dx, ddropped, _like(dy, base, needed), dA, dB, dweight, None, None, None, None


class GivenGates(torch.autograd.Function):
    """`given_gates` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x, dropped, tensor, A, B, gates, scale, base):
        """Compute y, and save x and the projections (without gates: the scaled projections)."""
        y, saved = _given_forward(x, dropped, tensor, A, B, gates, scale, base)
        _save(ctx, base, tensor, y, x if dropped is None else None, dropped, A, B, gates, saved)
        ctx.scale, ctx.base, ctx.shape, ctx.dtype = scale, base, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, tensor, A, B and gates."""
        if dy is None:
            return (None,) * 8
        base_weight, x, dropped, A, B, gates, projection = ctx.saved_tensors
        base, scale, needed = ctx.base, ctx.scale, ctx.needs_input_grad
        if torch.is_grad_enabled():
            update = _given_update(x, dropped, A, B, gates, scale, base)
            inputs = (x, dropped, A, B, gates)
            dx, *rest = _differentiable(update, dy, base_weight, inputs, needed, base)
            return (dx, *rest, None, None)
        source = x if dropped is None else dropped
        with _no_autocast(source):
            flat = dy.reshape(-1, dy.shape[-1])
            narrow = flat.to(base.dtype)
            u = projection if gates is None else projection * _rows(gates * scale, projection)
            dB = (u.t() @ narrow).to(B.dtype).t().contiguous() if needed[4] else None
            dp = narrow @ B.to(base.dtype)
            dgates = None
            if gates is None:
                dp.mul_(scale)
            else:
                if needed[5]:
                    rows = len(dp) // max(len(gates), 1)  # −1 would be ambiguous without tokens.
                    by_gate = (dp.to(gates.dtype) * projection.to(gates.dtype)).unflatten(0, (len(gates), rows))
                    dgates = by_gate.sum(1) * scale
                dp = dp.mul_(_rows(gates * scale, dp))
            dx = _base_backward(flat, base_weight, base) if needed[0] else None
            ddropped = None
            if dropped is not None:
                dx = dx.view(ctx.shape) if dx is not None else None
                ddropped = _accumulate(None, dp, A, dropped, base) if needed[1] else None
            elif needed[0]:
                dx = _accumulate(dx, dp, A, source, base)
            dA = _product(dp, source, A, base) if needed[3] else None
            return dx, ddropped, _like(dy, base, needed), dA, dB, dgates, None, None


def _token_forward(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    spec: GateSpec,
    base: Base,
    kernels: Any,
    keep: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    y = tensor if base.layer is None else base.layer(x)
    with _no_autocast(x):
        flat = x.reshape(-1, x.shape[-1])
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        if dropped is None and dtype == base.dtype and len(flat) > _FEW_TOKENS:
            both = flat.to(dtype) @ torch.cat([A.to(dtype), weight.to(dtype)]).t()
            projection, logits = both.split([len(A), len(weight)], 1)
        else:
            source = flat if dropped is None else dropped.reshape(flat.shape)
            projection = source.to(base.dtype) @ A.to(base.dtype).t()
            logits = flat.to(dtype) @ weight.to(dtype).t()
        if not keep and len(flat) <= kernels.DECODE_TOKENS and base.in_place and y.is_contiguous():
            return y, kernels.decode(y.view(-1, len(B)), logits, projection, balance_bias, B, spec), ()
        u, indices, chosen = kernels.forward(logits, projection, balance_bias, spec)
        return _add(y, u, B, base), indices, chosen


def _given_forward(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor | None,
    scale: float,
    base: Base,
) -> tuple[Tensor, Tensor]:
    y = tensor if base.layer is None else base.layer(x)
    with _no_autocast(x):
        source = x if dropped is None else dropped
        projection = source.reshape(-1, x.shape[-1]).to(base.dtype) @ A.to(base.dtype).t()
        u = projection.mul_(scale) if gates is None else projection * _rows(gates * scale, projection)
        return _add(y, u, B, base), projection


def _add(y: Tensor, u: Tensor, B: Tensor, base: Base) -> Tensor:
    # y + u Bᵀ, in place where that is allowed, and no narrower than either on the way.
    flat = y.reshape(-1, y.shape[-1])
    in_place = base.in_place and y.is_contiguous()
    B = B.to(u.dtype)
    if y.dtype == u.dtype:
        if in_place:
            flat.addmm_(u, B.t())
            return y
        return torch.addmm(flat, u, B.t()).view(y.shape)
    if torch.promote_types(y.dtype, u.dtype) == u.dtype:
        return flat.to(u.dtype).addmm_(u, B.t()).to(y.dtype).view(y.shape)
    return (flat + u @ B.t()).to(y.dtype).view(y.shape)


def _save(ctx: Any, base: Base, tensor: Tensor, y: Tensor, *tensors: Tensor | None) -> None:
    # The base layer's weight is what its input's gradient needs; an output that the op was given is not kept.
    ctx.save_for_backward(None if base.layer is None else tensor, *tensors)
    if y is tensor:
        ctx.mark_dirty(y)


def _base_backward(dy: Tensor, base_weight: Tensor | None, base: Base) -> Tensor | None:
    if base_weight is None:
        return None
    return dy @ (base_weight.t() if base.transposed else base_weight)


def _accumulate(dx: Tensor | None, gradient: Tensor, weight: Tensor, x: Tensor, base: Base) -> Tensor:
    # dx + gradient · weight in x's shape and dtype; dx is ours to overwrite.
    weight = weight.to(base.dtype)
    if dx is None:
        dx = (gradient @ weight).to(x.dtype)
    elif dx.dtype == gradient.dtype:
        dx.addmm_(gradient, weight)
    else:
        dx = dx.add_(gradient @ weight)
    return dx.view(x.shape)


def _weight_gradients(
    both: Tensor, x: Tensor, A: Tensor, weight: Tensor, needs_A: bool, needs_weight: bool, base: Base
) -> tuple[Tensor | None, Tensor | None]:
    num_ranks = A.shape[0]
    if needs_A and needs_weight and A.dtype == weight.dtype:
        return _product(both, x, A, base).split([num_ranks, len(weight)])
    dA = _product(both[:, :num_ranks], x, A, base) if needs_A else None
    return dA, _product(both[:, num_ranks:], x, weight, base) if needs_weight else None


def _product(gradient: Tensor, x: Tensor, parameter: Tensor, base: Base) -> Tensor:
    return (gradient.t() @ x.reshape(-1, x.shape[-1]).to(base.dtype)).to(parameter.dtype)


def _rows(gates: Tensor, projection: Tensor) -> Tensor:
    # (G, r) → (1 or N, r): a row for every token, in the projections' dtype.
    gates = gates.to(projection.dtype)
    return gates if len(gates) in (1, len(projection)) else gates.repeat_interleave(len(projection) // len(gates), 0)


def _like(dy: Tensor, base: Base, needed: tuple[bool, ...]) -> Tensor | None:
    return dy if base.layer is None and needed[2] else None


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    # Entering torch.autocast costs as much as a product of a few tokens.
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _token_update(
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor | None,
    chosen: Chosen,
    spec: GateSpec,
    base: Base,
) -> Tensor:
    # The plain formula, differentiable any number of times, with the choice that forward made.
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    indices = chosen.indices.long()
    with _no_autocast(x):
        logits = F.linear(x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)).gather(1, indices)
        if spec.score_function == "sigmoid":
            values = logits.sigmoid() if spec.biased_gates else F.logsigmoid(logits)
        else:
            values = logits
        if balance_bias is not None:
            values = values + balance_bias[indices]
        weights = torch_gate.gate_weights(values, spec) * (spec.top_k * spec.scale)
        gates = torch.zeros(len(weights), len(weight), dtype=dtype, device=x.device).scatter(1, indices, weights)
    return _given_update(x, dropped, A, B, gates.repeat_interleave(len(A) // len(weight), 1), 1.0, base)


def _given_update(
    x: Tensor | None, dropped: Tensor | None, A: Tensor, B: Tensor, gates: Tensor | None, scale: float, base: Base
) -> Tensor:
    source = x if dropped is None else dropped
    assert source is not None
    with _no_autocast(source):
        u = F.linear(source.reshape(-1, source.shape[-1]).to(base.dtype), A.to(base.dtype))
        u = u * scale if gates is None else u * _rows(gates * scale, u)
        return F.linear(u, B.to(base.dtype))


def _differentiable(
    update: Tensor,
    dy: Tensor,
    base_weight: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    base: Base,
) -> tuple[Tensor | None, ...]:
    # Gradients of x, dropped, tensor, A, B and the last input, with a graph of their own.
    x, dropped, *rest = inputs
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    flat = dy.reshape(-1, dy.shape[-1])
    found = iter(torch.autograd.grad(update, wanted, flat.to(update.dtype), create_graph=True, allow_unused=True))
    gradients = [next(found) if t is not None and t.requires_grad else None for t in (x, dropped, *rest)]
    if needed[0] and base_weight is not None:
        through_base = flat @ (base_weight.t() if base.transposed else base_weight)
        through_base = through_base.view((*dy.shape[:-1], through_base.shape[-1]))
        gradients[0] = through_base if gradients[0] is None else gradients[0] + through_base
    return gradients[0], gradients[1], _like(dy, base, needed), *gradients[2:]
