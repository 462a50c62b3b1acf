"""The losses that train a gate's choice: balancing for tokens, contrast for tasks.

Shapes: N tokens, E experts, B examples, T tasks, e task-embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .choice import Routing
from .token import expert_load


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, equation 4), without its coefficient.

    E · Σ_i f_i P_i, with f_i the share of the choices that fell on expert i and P_i its mean probability; 1 where
    the load is even.

    Args:
        routing: From a token router, N tokens.
        mask: (N,) true where a token counts; None: all do. Where none does, the loss is 0.

    Returns:
        A scalar, differentiable through the probabilities.

    Example:
        >>> routing = Routing(torch.ones(4, 2), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5))
        >>> float(balance_loss(routing))
        1.0
    """
    probabilities = routing.probabilities
    num_experts = probabilities.shape[-1]
    load = expert_load(routing.indices, num_experts, mask).to(probabilities.dtype)
    share = load / load.sum().clamp(min=1)
    if mask is None:
        mean = probabilities.sum(0) / max(len(probabilities), 1)
    else:
        weight = mask.to(probabilities.dtype)
        mean = (probabilities * weight[:, None]).sum(0) / weight.sum().clamp(min=1)
    return num_experts * (share * mean).sum()


def contrastive_loss(
    examples: Tensor, task_embedding: Tensor, task_ids: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """MoRE's contrastive loss of one layer (arXiv 2505.22694, section 3), without its coefficient.

    − mean_i log softmax_t(cos(h_i, e_t) / τ)[t_i].

    Args:
        examples: (B, e) pooled inputs h, projected where e ≠ d_in.
        task_embedding: (T, e).
        task_ids: (B,) int64.
        temperature: τ.
        mask: (B,) true where an example counts; None: all do. Where none does, the loss is 0.

    Returns:
        A scalar.

    Example:
        >>> e = torch.eye(2)
        >>> float(contrastive_loss(e, e, torch.tensor([0, 1]), temperature=0.05)) < 1e-6
        True
    """
    cosine = F.normalize(examples, dim=-1) @ F.normalize(task_embedding, dim=-1).T
    losses = F.cross_entropy(cosine / temperature, task_ids, reduction="none")
    if mask is None:
        return losses.sum() / max(len(losses), 1)
    return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp(min=1)
