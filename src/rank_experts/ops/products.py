"""The op's forward and backward in as few passes as PyTorch allows, without autograd.

Shapes: N tokens (all leading dimensions together), d_in and d_out features, r ranks, E experts, G gates' rows, each
for N / G tokens in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import gate as torch_gate
from . import native, native_given
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


def token_forward(
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
    shared: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return y (…, d_out), the chosen experts (N, k), and `Chosen`, or nothing where `keep` is false.

    `shared` are the projections (N, r) and logits (N, E), where they have been computed already.
    """
    y = base_output(x, tensor, base)
    with no_autocast(x):
        if kernels is native:
            return native.token_forward(x, dropped, y, A, B, weight, balance_bias, spec, base)
        flat = x.reshape(-1, x.shape[-1])
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        if shared is not None:
            projection, logits = shared
        elif dropped is None and len(flat) > _FEW_TOKENS:
            projection, logits = multiply(flat, [(A, base.dtype), (weight, dtype)])
        else:
            source = flat if dropped is None else dropped.reshape(flat.shape)
            ((projection,), (logits,)) = multiply(source, [(A, base.dtype)]), multiply(flat, [(weight, dtype)])
        if not keep and len(flat) <= kernels.DECODE_TOKENS and base.in_place and y.is_contiguous():
            return y, kernels.decode(y.view(-1, len(B)), logits, projection, balance_bias, B, spec), ()
        u, indices, chosen = kernels.forward(logits, projection, balance_bias, spec)
        return _add(y, u, B, base), indices, chosen


def given_forward(
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
) -> tuple[Tensor, Tensor]:
    """Return y (…, d_out) and the projections (N, r), scaled where there are no gates and PyTorch computes.

    `shared` are the projections (N, r), where they have been computed already.
    """
    y = base_output(x, tensor, base)
    with no_autocast(x):
        if kernels is native_given:
            return native_given.forward(x, dropped, y, A, B, gates, len(A), scale, base)
        if shared is None:
            source = x if dropped is None else dropped
            projection = source.reshape(-1, x.shape[-1]).to(base.dtype) @ A.to(base.dtype).t()
            u = projection.mul_(scale) if gates is None else projection * gate_rows(gates * scale, projection)
        else:
            u = shared * (scale if gates is None else gate_rows(gates * scale, shared))
            projection = u if gates is None else shared
        return _add(y, u, B, base), projection


def token_backward(
    dy: Tensor,
    base_weight: Tensor | None,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor | None,
    chosen: Chosen,
    spec: GateSpec,
    base: Base,
    kernels: Any,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dropped, A, B and weight; `needed` says of x, dropped, tensor, A, B, weight which."""
    with no_autocast(x):
        num_experts, num_ranks = weight.shape[0], A.shape[0]
        flat = dy.reshape(-1, dy.shape[-1])
        if kernels is native:
            dx = base_backward(dy, base_weight, base) if needed[0] else None
            return native.token_backward(dx, flat, x, dropped, A, B, weight, balance_bias, chosen, spec, needed)
        both, dB = kernels.backward(flat.to(base.dtype), B.to(base.dtype), chosen, balance_bias, spec, num_experts)
        dB = dB.to(B.dtype).t().contiguous() if needed[4] else None
        dx = base_backward(dy, base_weight, base) if needed[0] else None
        if dropped is None:
            dx = _accumulate(dx, both, torch.cat([A, weight]), x, base) if needed[0] else None
            dA, dweight = _weight_gradients(both, x, A, weight, needed[3], needed[5], base)
            return dx, None, dA, dB, dweight
        dp, dz = both[:, :num_ranks], both[:, num_ranks:]
        dx = _accumulate(dx, dz, weight, x, base) if needed[0] else None
        ddropped = _accumulate(None, dp, A, dropped, base) if needed[1] else None
        dA = _product(dp, dropped, A, base) if needed[3] else None
        return dx, ddropped, dA, dB, _product(dz, x, weight, base) if needed[5] else None


def given_backward(
    dy: Tensor,
    base_weight: Tensor | None,
    x: Tensor | None,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    gates: Tensor | None,
    projection: Tensor,
    scale: float,
    base: Base,
    kernels: Any,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dropped, A, B and gates; `needed` says of x, dropped, tensor, A, B, gates which."""
    source = x if dropped is None else dropped
    assert source is not None
    with no_autocast(source):
        if kernels is native_given:
            dx = base_backward(dy, base_weight, base) if needed[0] else None
            return native_given.backward(dx, dy, x, dropped, A, B, gates, projection, scale, needed)
        dp, dB, dgates = projection_backward(dy, B, gates, projection, scale, base, needed)
        dx = base_backward(dy, base_weight, base) if needed[0] else None
        ddropped = _accumulate(None, dp, A, source, base) if dropped is not None and needed[1] else None
        if dropped is None and needed[0]:
            dx = _accumulate(dx, dp, A, source, base)
        return dx, ddropped, _product(dp, source, A, base) if needed[3] else None, dB, dgates


def projection_backward(
    dy: Tensor,
    B: Tensor,
    gates: Tensor | None,
    projection: Tensor,
    scale: float,
    base: Base,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the projections, B and gates, from what `given_forward` returned."""
    narrow = dy.reshape(-1, dy.shape[-1]).to(base.dtype)
    u = projection if gates is None else projection * gate_rows(gates * scale, projection)
    dB = (u.t() @ narrow).to(B.dtype).t().contiguous() if needed[4] else None
    dp = narrow @ B.to(base.dtype)
    if gates is None:
        return dp.mul_(scale), dB, None
    dgates = None
    if needed[5]:
        rows = len(dp) // max(len(gates), 1)  # −1 would be ambiguous without tokens.
        by_gate = (dp.to(gates.dtype) * projection.to(gates.dtype)).unflatten(0, (len(gates), rows))
        dgates = by_gate.sum(1) * scale
    return dp.mul_(gate_rows(gates * scale, dp)), dB, dgates


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


def base_output(x: Tensor, tensor: Tensor, base: Base) -> Tensor:
    """Return the base layer's output (…, d_out), applied here where it is the op's to apply."""
    if base.layer is None:
        return tensor
    y = base.layer(x)
    # Of a function's output that is a view, as layers return it for (B, L, d), autograd forbids changes in place.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def base_backward(dy: Tensor, base_weight: Tensor | None, base: Base) -> Tensor | None:
    """Return the gradient (N, d_in) that the base layer sends back; None where it is a node of its own."""
    if base_weight is None:
        return None
    return dy.reshape(-1, dy.shape[-1]) @ (base_weight.t() if base.transposed else base_weight)


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


def multiply(x: Tensor, matrices: Sequence[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
    """Return x · Wᵀ (N, rows) for several matrices W (rows, d_in), each in the dtype that stands beside it.

    As few products as there are dtypes. On an accelerator that returns what it adds up, float32, from 16-bit numbers,
    whose products are exact in it, it is one, and x is not cast.

    Args:
        x: (N, d_in).
        matrices: W, and the dtype to compute in, no narrower than the router needs.
    """
    found: dict[int, Tensor] = {}
    dtypes = [dtype for _, dtype in matrices]
    if _returns_wide(x, matrices):
        product = torch.mm(x, _stacked([matrix for matrix, _ in matrices]).t(), out_dtype=torch.float32)
        parts = product.split([len(matrix) for matrix, _ in matrices], 1)
        return [part.to(dtype) for part, dtype in zip(parts, dtypes)]
    for dtype in dict.fromkeys(dtypes):
        own = [i for i, each in enumerate(dtypes) if each == dtype]
        product = x.to(dtype) @ _stacked([matrices[i][0].to(dtype) for i in own]).t()
        found |= zip(own, product.split([len(matrices[i][0]) for i in own], 1))
    return [found[i] for i in range(len(matrices))]


def _stacked(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _returns_wide(x: Tensor, matrices: Sequence[tuple[Tensor, torch.dtype]]) -> bool:
    # Whether `torch.mm` has an `out_dtype` for these, which it has on CUDA alone, and one of them needs it.
    kinds = {x.dtype, *(matrix.dtype for matrix, _ in matrices)}
    return (
        x.is_cuda
        and kinds in ({torch.bfloat16}, {torch.float16})
        and torch.float32 in (dtype for _, dtype in matrices)
        and torch.version.hip is None
    )


def gate_rows(gates: Tensor, projection: Tensor) -> Tensor:
    """Return (G, r) as (1 or N, r): a row for every token, in the projections' dtype."""
    gates = gates.to(projection.dtype)
    return gates if len(gates) in (1, len(projection)) else gates.repeat_interleave(len(projection) // len(gates), 0)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off, where it is on: entering it costs as much as a product of a few tokens."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def output_gradient(dy: Tensor, base: Base, needed: tuple[bool, ...]) -> Tensor | None:
    """Return the gradient of `tensor`: dy, where it is the base layer's output."""
    return dy if base.layer is None and needed[2] else None
