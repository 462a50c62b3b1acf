"""The formula in plain PyTorch: the oracle of every faster implementation.

Shapes: N tokens, d_in and d_out features, r ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing.choice import Routing
from ..routing.token import TokenGate
from .operands import Operands


def rank_experts_reference(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Add a gated low-rank update to a base layer's output: y + s · (g ⊙ (x Aᵀ)) Bᵀ.

    Autocast applies to the two products as it does to any linear layer.

    Args:
        y: (N, d_out) the base layer's output.
        x: (N, d_in) its input, after dropout.
        A: (r, d_in).
        B: (d_out, r).
        gates: (N, r) g, or None where all are 1.
        scale: s.

    Returns:
        (N, d_out) in y's dtype.

    Example:
        >>> y, x, A, B = torch.zeros(2, 3), torch.ones(2, 4), torch.ones(5, 4), torch.ones(3, 5)
        >>> rank_experts_reference(y, x, A, B, scale=0.5)[0]
        tensor([10., 10., 10.])
    """
    u = F.linear(x, A)
    u = u * scale if gates is None else u * (gates * scale).to(u.dtype)
    return (y + F.linear(u, B)).to(y.dtype)


def reference(y: Tensor, op: Operands) -> tuple[Tensor, Routing | None]:
    """Add the update to the base layer's output y (…, d_out), whatever the operands are.

    Returns:
        (…, d_out) in y's dtype, and what a token gate decided.
    """
    routing, gates = None, op.gate
    if isinstance(op.gate, TokenGate):
        routing = op.gate.route(op.x.reshape(-1, op.x.shape[-1]))
        gates = routing.gates
    source = op.source.reshape(-1, op.source.shape[-1])
    if not torch.is_autocast_enabled(source.device.type):
        source = source.to(op.A.dtype)
    A, B = op.A, op.B
    if isinstance(gates, Tensor):
        A, B = A.narrow(0, 0, gates.shape[1]), B.narrow(1, 0, gates.shape[1])
        # Not len(), which makes a constant of a size that torch.export is to leave open.
        if gates.shape[0] not in (1, source.shape[0]):
            gates = gates.repeat_interleave(source.shape[0] // gates.shape[0], 0)
    flat = rank_experts_reference(y.reshape(-1, y.shape[-1]), source, A, B, gates, op.scale)  # type: ignore[arg-type]
    return flat.reshape(y.shape), routing
