"""What stands for an example in MoRE's contrastive loss and in a classifier: one vector of its tokens.

Positions are counted in whole numbers and sums are taken in float32 or better, whatever the values' dtype: in bfloat16
whole numbers end at 256, and float16's end at 65,504 as sums.

Shapes: B examples, L tokens of each, n gathered tokens, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_examples(x: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Reduce each example's tokens to one vector.

    Args:
        x: (B, L, d).
        mask: (B, L) true where a token is not padding; None: all are tokens.
        pooling: "mean" over the tokens, the "first" or the "last" of them, wherever the padding lies.

    Returns:
        (B, d) in float32 or better; zeros for an example that is all padding.

    Example:
        >>> pool_examples(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
        tensor([[2.]])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if pooling == "mean" and mask is None:
        return x.sum(1, dtype=dtype) / max(x.shape[1], 1)
    chosen = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool) if mask is None else mask.bool()
    if pooling == "mean":
        with torch.autocast(x.device.type, enabled=False):
            total = torch.bmm(chosen[:, None].to(dtype), x.to(dtype)).squeeze(1)  # No product of x's size in between.
        return total / chosen.sum(1, keepdim=True).clamp(min=1)
    order = torch.arange(1, x.shape[1] + 1, device=x.device)
    position = ((order.flip(0) if pooling == "first" else order) * chosen).argmax(1)
    picked = x[torch.arange(len(x), device=x.device), position].to(dtype)
    return torch.where(chosen.any(1, keepdim=True), picked, 0)


def pool_gathered(
    x: Tensor, examples: Tensor, positions: Tensor, num_examples: int, mask: Tensor | None, pooling: str
) -> tuple[Tensor, Tensor]:
    """Reduce to one vector an example what a mixture of experts gathered from all over the batch; see `pool_examples`.

    Args:
        x: (n, d) tokens in any order.
        examples: (n,) int64, the example of each.
        positions: (n,) int64, its place in the batch, which orders an example's tokens.
        num_examples: B.
        mask: (n,) true where a token is not padding; None: all are tokens.
        pooling: "mean", "first" or "last".

    Returns:
        (B, d) in float32 or better, zeros for an example that has no token here; and (B,) whether it has one.

    Example:
        >>> pooled, present = pool_gathered(
        ...     torch.tensor([[1.0], [3.0]]), torch.tensor([2, 2]), torch.tensor([4, 5]), 3, None, "mean"
        ... )
        >>> pooled.flatten().tolist(), present.tolist()
        ([0.0, 0.0, 2.0], [False, False, True])
    """
    chosen = torch.ones_like(examples, dtype=torch.bool) if mask is None else mask.bool()
    if pooling != "mean":
        order = (positions + 1 if pooling == "last" else -positions - 1).masked_fill(~chosen, -(2**62))
        best = order.new_full((num_examples,), -(2**62)).scatter_reduce(0, examples, order, "amax")
        chosen = chosen & (order == best[examples])
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = examples.new_zeros(num_examples).index_add(0, examples, chosen.to(examples.dtype))
    total = x.new_zeros(num_examples, x.shape[-1], dtype=dtype)
    total = total.index_add(0, examples, torch.where(chosen[:, None], x, 0).to(dtype))
    return total / count[:, None].clamp(min=1), count > 0
