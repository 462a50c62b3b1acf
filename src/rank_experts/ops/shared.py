"""Several layers that read one input: x · Wᵀ for all of their A and W_g at once, and the op from there on.

`project` is one node of the graph whose results are the layers' projections and logits. Its backward gets the
derivatives of all of them together, so that x's gradient and the weights' are one product each. The layers' own nodes
(`fused.py`) then start from there.

Shapes as in `products.py`; M matrices W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .products import multiply, no_autocast


class Reader(NamedTuple):
    """What a layer multiplies its input with, and what decides by which kernels.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        weight: (E, d_in) W_g; None without a token router.
        top_k: k; 0 without a token router.
    """

    A: Tensor
    B: Tensor
    weight: Tensor | None
    top_k: int


class Shared(NamedTuple):
    """What a layer gets of the joint product.

    Attributes:
        projection: (N, r) x Aᵀ in the dtype that the adapter computes in.
        logits: (N, E) x W_gᵀ, float32 or wider; None without a token router.
    """

    projection: Tensor
    logits: Tensor | None


def project(x: Tensor, matrices: Sequence[tuple[Tensor, torch.dtype]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Compute x Wᵀ for several matrices, one product for each dtype among them.

    Args:
        x: (…, d_in).
        matrices: W (rows, d_in), and the dtype of its product.
        dtype: What backward computes in.

    Returns:
        (N, rows) for each W.

    Example:
        >>> first, second = torch.ones(2, 3), torch.ones(5, 3)
        >>> [tuple(z.shape) for z in project(torch.ones(4, 3), [(first, first.dtype), (second, first.dtype)], x.dtype)]
        [(4, 2), (4, 5)]
    """
    return Project.apply(x, tuple(kind for _, kind in matrices), dtype, *(matrix for matrix, _ in matrices))


class Project(torch.autograd.Function):
    """`project` with its derivative, which is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x, dtypes, dtype, *matrices):
        """Multiply."""
        ctx.save_for_backward(x, *matrices)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        with no_autocast(x):
            return tuple(multiply(x.reshape(-1, x.shape[-1]), list(zip(matrices, dtypes))))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the matrices whose products were used."""
        x, *matrices = ctx.saved_tensors
        needs_x, _, _, *needed = ctx.needs_input_grad
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        dx, dmatrices = None, [None] * len(matrices)
        with no_autocast(x):
            dz = [gradient.to(ctx.dtype) for gradient in gradients if gradient is not None]
            if needs_x and used:
                dx = (torch.cat(dz, 1) @ torch.cat([matrices[i] for i in used]).to(ctx.dtype)).to(x.dtype).view(x.shape)
            if wanted := [i for i in used if needed[i]]:
                columns = torch.cat([dz[used.index(i)] for i in wanted], 1)
                product = columns.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                for i, part in zip(wanted, product.split([matrices[i].shape[0] for i in wanted])):
                    dmatrices[i] = part.to(matrices[i].dtype)
        return (dx, None, None, *dmatrices)
