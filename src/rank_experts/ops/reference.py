"""The formula in plain PyTorch: the oracle of every faster implementation.

Shapes: N tokens, d_in and d_out features, r ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
