"""The op with given gates by the native kernel: for few ranks, all of which a token uses.

Forward is one call after the base layer, backward another.

Shapes as in `operands.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....routing.token import TokenGate
from ...operands import Gradients, Kept, Needed, Operands
from .build import library
from .token import NARROW, accumulator, joined, pointer, tiles

# Up to this many ranks the kernel is expected to beat dense products; also in native_given.h.
FEW_RANKS = 16


def forward(op: Operands, y: Tensor) -> Kept:
    """Add the update of the first q ranks to y (…, d_out), which is contiguous, in place; return what to keep."""
    source, A, B, gates = op.source.contiguous(), op.A.contiguous(), op.B.contiguous(), _gates(op)
    (num_ranks, d_in), d_out, num_used = A.shape, B.shape[0], op.num_used
    num_tokens = source.numel() // d_in
    projections = torch.empty(num_tokens, num_used)
    scratch = torch.empty(tiles(d_in, d_out) * num_used)
    if num_tokens:
        library().rank_experts_given_forward(  # type: ignore[union-attr]
            num_tokens, d_in, d_out, num_ranks, num_used, 0, _flags(source, y, A, B), torch.get_num_threads(),
            op.scale, source.data_ptr(), A.data_ptr(), B.data_ptr(), pointer(gates),
            1 if gates is None else len(gates), y.data_ptr(), projections.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
    return Kept(projections.to(op.dtype))


def backward(op: Operands, kept: Kept, dy: Tensor, dx: Tensor | None, needed: Needed) -> Gradients:
    """Differentiate; dy is contiguous."""
    (num_ranks, d_in), d_out, num_used = op.A.shape, op.B.shape[0], op.num_used
    source, A, B, gates = op.source.contiguous().view(-1, d_in), op.A.contiguous(), op.B.contiguous(), _gates(op)
    num_tokens, threads, projections = len(source), torch.get_num_threads(), kept.projections.float()
    # What A read gets the gradient: x, to which the base layer has its share, or x after dropout.
    share, asked = (dx, needed.x) if op.dropped is None else (None, needed.dropped)
    into = accumulator(share, source) if asked else None
    # Without tokens the kernel does not run.
    make = torch.empty if num_tokens else torch.zeros
    dA = make(A.shape, dtype=A.dtype) if needed.A else None
    dB = make(B.shape, dtype=B.dtype) if needed.B else None
    dgates = make(gates.shape) if gates is not None and needed.gate else None
    scratch = torch.empty(tiles(d_in, d_out) * num_used * (1 + threads) + projections.numel())
    if num_tokens:
        library().rank_experts_given_backward(  # type: ignore[union-attr]
            num_tokens, d_in, d_out, num_ranks, num_used, 0, _flags(source, dy, A, B), threads, op.scale,
            dy.data_ptr(), source.data_ptr(), A.data_ptr(), B.data_ptr(), pointer(gates),
            1 if gates is None else len(gates), projections.data_ptr(), pointer(into), into is not share,
            pointer(dA), pointer(dB), pointer(dgates), scratch.data_ptr(),
        )  # fmt: skip
    if dgates is not None and isinstance(op.gate, Tensor):
        dgates = dgates.to(op.gate.dtype)
    found = joined(share, into)
    return Gradients(*((found, None) if op.dropped is None else (dx, found)), dA, dB, dgates)


def _gates(op: Operands) -> Tensor | None:
    assert not isinstance(op.gate, TokenGate)
    return None if op.gate is None else op.gate.float().contiguous()


def _flags(source: Tensor, y: Tensor, A: Tensor, B: Tensor) -> int:
    # As `Call` in native_tiles.h has them.
    return sum(bit for bit, tensor in ((16, source), (32, y), (64, A), (128, B)) if tensor.dtype == NARROW)
