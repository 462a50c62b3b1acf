"""The task gate of MoRE (arXiv 2505.22694, section 3): every task chooses a rank r_t and uses ranks 1…r_t.

p_t = softmax(W e_t + c), r_t = 1 + argmax p_t, and g_j = [j ≤ r_t] · (1 + p_t[r_t] − stop_gradient(p_t[r_t])): the gate
is 1 in the forward and passes the gradient to the choice's probability (straight-through). The published code leaves
the last factor out, so that neither its gate nor its embeddings receive a gradient from the task.

Shapes: N tasks asked for, T tasks, r ranks, e task-embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .choice import Routing


class TaskGate(NamedTuple):
    """A task gate: an adapter's tensors and its constant.

    Attributes:
        task_embedding: (T, e).
        weight: (r, e) W.
        bias: (r,) c.
        rank_scaling: "linear" multiplies a task's gates by r_t / T (the paper's), "quadratic" multiplies rank j by
            (j / r)² (the published code), "none" leaves them.

    Example:
        >>> TaskGate(torch.randn(3, 16), torch.randn(8, 16), torch.randn(8)).route(torch.tensor([0, 2])).gates.shape
        torch.Size([2, 8])
    """

    task_embedding: Tensor
    weight: Tensor
    bias: Tensor
    rank_scaling: str = "linear"

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.task_embedding.shape[0]

    def route(self, task_ids: Tensor) -> Routing:
        """Route tasks.

        Args:
            task_ids: (N,) int64.

        Returns:
            Routing: gates (N, r) with the rank scaling in them, indices (N,) the chosen ranks r_t in 1…r,
            probabilities (N, r).
        """
        logits = task_logits(self.task_embedding, self.weight, self.bias, task_ids)
        return task_routing(logits, self.num_tasks, self.rank_scaling)


def task_logits(task_embedding: Tensor, gate_weight: Tensor, gate_bias: Tensor, task_ids: Tensor) -> Tensor:
    """Return MoRE's logits W e_t + c (N, r) of tasks (N,), in float32 or better, autocast or not.

    Example:
        >>> task_logits(torch.eye(2), torch.ones(3, 2), torch.arange(3.0), torch.tensor([1]))
        tensor([[1., 2., 3.]])
    """
    dtype = torch.promote_types(gate_weight.dtype, torch.float32)
    with torch.autocast(gate_weight.device.type, enabled=False):
        return F.linear(task_embedding.to(dtype)[task_ids], gate_weight.to(dtype), gate_bias.to(dtype))


def task_routing(logits: Tensor, num_tasks: int, rank_scaling: str) -> Routing:
    """Choose each task's ranks by the logits (N, r) of `task_logits`; see `TaskGate`.

    Example:
        >>> task_routing(torch.tensor([[0.0, 2.0, 1.0]]), num_tasks=4, rank_scaling="none").gates
        tensor([[1., 1., 0.]])
    """
    probabilities = logits.softmax(-1)
    # By the logits, of which fewer are equal: the lower index among equals.
    best = logits.argmax(-1, keepdim=True)
    chosen = probabilities.gather(-1, best)
    num_ranks = logits.shape[-1]
    rank = torch.arange(num_ranks, device=best.device)
    gates = (rank <= best).to(logits.dtype) * (1 + (chosen - chosen.detach()))
    if rank_scaling == "linear":
        gates = gates * (best + 1).to(logits.dtype) / num_tasks
    elif rank_scaling == "quadratic":
        gates = gates * ((rank + 1).to(logits.dtype) / num_ranks).square()
    return Routing(gates, best.squeeze(-1) + 1, probabilities)
