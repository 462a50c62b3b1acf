"""PyTorch's backend with the token gate in Triton, for CUDA; with one launch for a few tokens, and one for loads."""

from __future__ import annotations

import torch
from torch import Tensor

from ....routing.token import TokenGate
from ...operands import Base, Gradients, Kept, Needed, Operands
from .. import pytorch
from . import kernels

NAME = "fused function, gate in Triton"
# Up to this many tokens without gradients, one launch does all that follows the first product.
DECODE_TOKENS = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_RANKS = 256
_IN_TRITON = pytorch.GateFunctions(kernels.forward, kernels.backward)


def serves(op: Operands) -> bool:
    """Say whether the kernels take this token gate; given gates are PyTorch's."""
    gate = op.gate
    if not isinstance(gate, TokenGate) or op.dtype not in _DTYPES or len(op.A) > _MAX_RANKS:
        return False
    return torch.float64 not in (op.x.dtype, gate.weight.dtype)


def forward(op: Operands, y: Tensor, fresh: bool) -> tuple[Tensor, Tensor | None, Kept]:
    """Add the update to y; see `Backend`."""
    return pytorch.forward(op, y, fresh, _IN_TRITON)


def backward(op: Operands, kept: Kept, dy: Tensor, dx: Tensor | None, needed: Needed) -> Gradients:
    """Differentiate the update; see `Backend`."""
    return pytorch.backward(op, kept, dy, dx, needed, _IN_TRITON)


def decode(base: Base, op: Operands) -> tuple[Tensor, Tensor] | None:
    """Apply a layer to a few tokens without gradients."""
    if op.x.numel() > DECODE_TOKENS * op.x.shape[-1] or not isinstance(op.gate, TokenGate):
        return None
    y = base.apply(op.x).contiguous()
    with pytorch.no_autocast(y):
        projection, logits = pytorch.project(op, op.gate)
        indices = kernels.decode(y.view(-1, len(op.B)), logits, projection, op.B, op.gate, op.scale)
    return y, indices


def count(y: Tensor, indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor | None:
    """Return what `load_of_output` does, in one launch beside that which makes the zeros; None for many experts."""
    return kernels.count(y, indices, num_experts, mask) if num_experts <= _MAX_RANKS else None
