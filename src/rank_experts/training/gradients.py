"""What the gradients of tasks say of a layer that they share: whether they agree, and how much of it they all want.

A task's gradient is taken twice, on two halves of its examples. Products are between the halves, so that the noise of
one example is in none of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LayerGradients(NamedTuple):
    """A layer's gradients, of the tasks' losses by the layer's adapter.

    Attributes:
        flat: (2, T, P), by all of the adapter's parameters, on either half of a task's examples; A's are the first.
        shape: (R, d_in), of A.
    """

    flat: Tensor
    shape: tuple[int, int]


def cosines(gradients: LayerGradients) -> Tensor:
    """Return (T, T), the cosines between the tasks' gradients; NaN where a task's halves have nothing in common."""
    first, second = gradients.flat
    inner = first @ second.T
    inner = (inner + inner.T) / 2
    sizes = inner.diagonal().clamp_min(0).sqrt()
    products = torch.outer(sizes, sizes)
    return torch.where(products > 0, inner / products, math.nan).clamp(-1, 1)


def common_energy(gradients: LayerGradients, rank: int) -> float:
    """Return the share of the tasks' gradient energy that lies among the directions that the other tasks want most.

    The rows of A's gradient, H = s · Bᵀ ∂L/∂ΔW, are directions of the layer's input. With H¹_t and H²_t on the halves
    of task t's examples,

        Σ_t ⟨H¹_t P_t, H²_t P_t⟩ / Σ_t ⟨H¹_t, H²_t⟩

    where P_t projects onto the `rank` leading right singular vectors of the other tasks' H¹ + H², each at size 1, one
    below the other. Tasks whose inputs have no direction in common are at 0, directions drawn at random at rank / d_in,
    tasks that change what the layer makes of the same inputs at 1. It does not tell whether they want the same change:
    the cosines do.

    Args:
        gradients: Of one layer.
        rank: Of the common subspace.

    Returns:
        0 to 1; NaN where the gradients are nothing but noise.

    Example:
        >>> apart = torch.eye(2)[None, :, None].repeat(2, 1, 1, 1).view(2, 2, 2)  # task 0 wants e0, task 1 e1
        >>> common_energy(LayerGradients(apart, (1, 2)), rank=1)
        0.0
    """
    R, d = gradients.shape
    halves = gradients.flat[:, :, : R * d].unflatten(-1, (R, d))
    whole = halves.sum(0)
    whole = whole / whole.flatten(1).norm(dim=1).clamp_min(torch.finfo(whole.dtype).tiny)[:, None, None]
    inside = energy = 0.0
    for task, (first, second) in enumerate(zip(*halves)):
        others = torch.cat([whole[:task], whole[task + 1 :]]).flatten(0, 1)
        # The right singular vectors from the smaller of the two squares; a layer has far more inputs than ranks.
        values, left = torch.linalg.eigh(others @ others.T)
        leading = left[:, -rank:][:, values[-rank:] > 1e-6 * values[-1]]
        basis = torch.linalg.qr(others.T @ leading).Q
        inside += float(((first @ basis) * (second @ basis)).sum())
        energy += float((first * second).sum())
    return min(max(inside / energy, 0.0), 1.0) if energy > 0 else math.nan
