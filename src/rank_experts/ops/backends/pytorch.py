"""PyTorch's backend: the op in as few passes as PyTorch allows, around a pair of gate functions.

What it does that a chain of PyTorch ops does not: the update is accumulated in the base layer's output and in the
gradient that the base layer sends back, in place, by the products that compute it; x · [A; W_g]ᵀ and its derivative
are one product each; the scale lies in the gates; of the gate, backward keeps `Kept` and recomputes the rest.

Shapes as in `operands.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...routing.token import TokenGate
from ..operands import Gradients, Kept, Needed, Operands
from . import gate

NAME = "fused PyTorch function"
# Below this many tokens two products cost less than putting A and W_g into one matrix.
_FEW_TOKENS = 32


class GateFunctions(NamedTuple):
    """The token gate between the two products; see `gate.forward` and `gate.backward`."""

    forward: Callable[[Tensor, Tensor, TokenGate, float], tuple[Tensor, Tensor, Kept]]
    backward: Callable[[Tensor, Tensor, Kept, TokenGate, float], tuple[Tensor, Tensor]]


IN_PYTORCH = GateFunctions(gate.forward, gate.backward)


def serves(op: Operands) -> bool:
    """Say yes: it takes every dtype on every device."""
    return True


def forward(
    op: Operands, y: Tensor, fresh: bool, functions: GateFunctions = IN_PYTORCH
) -> tuple[Tensor, Tensor | None, Kept]:
    """Add the update to y; see `Backend`. Without gates the kept projections are scaled."""
    if isinstance(op.gate, TokenGate):
        projection, logits = project(op, op.gate)
        u, indices, kept = functions.forward(logits, projection, op.gate, op.scale)
        return _add(y, u, op.B, fresh), indices, kept
    A, B = op.used()
    projection = op.source.reshape(-1, A.shape[1]).to(op.dtype) @ A.to(op.dtype).t()
    u = projection.mul_(op.scale) if op.gate is None else projection * gate_rows(op.gate * op.scale, projection)
    return _add(y, u, B, fresh), None, Kept(projection)


def backward(
    op: Operands, kept: Kept, dy: Tensor, dx: Tensor | None, needed: Needed, functions: GateFunctions = IN_PYTORCH
) -> Gradients:
    """Differentiate the update; see `Backend`."""
    dtype, (A, B), router = op.dtype, op.used(), []
    narrow = dy.reshape(-1, dy.shape[-1]).to(dtype)
    dBt, dgate, ddropped = None, None, None
    if isinstance(op.gate, TokenGate):
        columns, dBt = functions.backward(narrow, B.to(dtype), kept, op.gate, op.scale)
        router = [(op.gate.weight, needed.gate)]
    else:
        columns, dBt, dgate = _given_backward(op, kept.projections, narrow, needed)
    if op.dropped is None:
        dx, (dA, *dweight) = _input_backward(columns, op.x, dx, [(A, needed.A), *router], needed.x, dtype)
    else:
        dp, dz = columns[:, : len(A)], columns[:, len(A) :]
        ddropped, (dA,) = _input_backward(dp, op.dropped, None, [(A, needed.A)], needed.dropped, dtype)
        dweight = []
        if router:
            dx, dweight = _input_backward(dz, op.x, dx, router, needed.x, dtype)
    dA = None if dA is None else _padded(dA, op.A, 0)
    dB = _padded(dBt.to(B.dtype).t(), op.B, 1) if needed.B and dBt is not None else None
    return Gradients(dx, ddropped, dA, dB, dweight[0] if dweight else dgate)


def project(op: Operands, gate: TokenGate) -> tuple[Tensor, Tensor]:
    """Return the projections x Aᵀ (N, r) in the op's dtype, and the logits x W_gᵀ (N, E) in float32 or wider."""
    x = op.x.reshape(-1, op.x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, gate.weight.dtype), torch.float32)
    if op.dropped is None and len(x) > _FEW_TOKENS:
        projection, logits = multiply(x, [(op.A, op.dtype), (gate.weight, wide)])
        return projection, logits
    source = op.source.reshape(x.shape)
    return multiply(source, [(op.A, op.dtype)])[0], multiply(x, [(gate.weight, wide)])[0]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off, where it is on: entering it costs as much as a product of a few tokens."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


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
    """Return (G, q) as (1 or N, q): a row for every token, in the projections' dtype."""
    gates = gates.to(projection.dtype)
    return gates if len(gates) in (1, len(projection)) else gates.repeat_interleave(len(projection) // len(gates), 0)


def _given_backward(
    op: Operands, projection: Tensor, narrow: Tensor, needed: Needed
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # The gradients of the projections, of Bᵀ and of given gates, from dy (N, d_out) in the op's dtype.
    gates, scale = op.gate, op.scale
    assert not isinstance(gates, TokenGate)
    u = projection if gates is None else projection * gate_rows(gates * scale, projection)
    dBt = u.t() @ narrow if needed.B else None
    dp = narrow @ op.used()[1].to(op.dtype)
    if gates is None:
        return dp.mul_(scale), dBt, None
    dgates = None
    if needed.gate:
        rows = len(dp) // max(len(gates), 1)  # −1 would be ambiguous without tokens.
        by_gate = (dp.to(gates.dtype) * projection.to(gates.dtype)).unflatten(0, (len(gates), rows))
        dgates = by_gate.sum(1) * scale
    return dp.mul_(gate_rows(gates * scale, dp)), dBt, dgates


def _add(y: Tensor, u: Tensor, B: Tensor, fresh: bool) -> Tensor:
    # y + u Bᵀ, in place where that is allowed, and no narrower than either on the way.
    flat = y.reshape(-1, y.shape[-1])
    B = B.to(u.dtype)
    if y.dtype == u.dtype:
        if fresh and y.is_contiguous():
            flat.addmm_(u, B.t())
            return y
        return torch.addmm(flat, u, B.t()).view(y.shape)
    if torch.promote_types(y.dtype, u.dtype) == u.dtype:
        return flat.to(u.dtype).addmm_(u, B.t()).to(y.dtype).view(y.shape)
    return (flat + u @ B.t()).to(y.dtype).view(y.shape)


def _input_backward(
    columns: Tensor,
    x: Tensor,
    dx: Tensor | None,
    matrices: Sequence[tuple[Tensor, bool]],
    needs_x: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:
    # From the gradients of x's products with matrices (rows, d_in), side by side: x's, added to dx (N, d_in), which is
    # ours to overwrite, and those of the matrices that need one.
    if needs_x:
        matrix = _stacked([matrix for matrix, _ in matrices]).to(dtype)
        if dx is None:
            dx = (columns @ matrix).to(x.dtype)
        else:
            dx = dx.addmm_(columns, matrix) if dx.dtype == columns.dtype else dx.add_(columns @ matrix)
    wanted = [matrix for matrix, needed in matrices if needed]
    if not wanted:
        return dx, [None] * len(matrices)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    if len(matrices) == 1:
        return dx, [(columns.t() @ flat).to(wanted[0].dtype)]
    sizes = [len(matrix) for matrix, _ in matrices]
    if len(wanted) == len(matrices) and len({matrix.dtype for matrix in wanted}) == 1:
        return dx, list((columns.t() @ flat).to(wanted[0].dtype).split(sizes))
    parts = zip(columns.split(sizes, 1), matrices)
    return dx, [(part.t() @ flat).to(matrix.dtype) if needed else None for part, (matrix, needed) in parts]


def _padded(gradient: Tensor, tensor: Tensor, dim: int) -> Tensor:
    # The gradient of the ranks that are used, as that of all.
    if gradient.shape == tensor.shape:
        return gradient.contiguous()
    whole = gradient.new_zeros(tensor.shape)
    whole.narrow(dim, 0, gradient.shape[dim]).copy_(gradient)
    return whole
