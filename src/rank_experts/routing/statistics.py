"""What is known of one adapted layer's routing: from its tensors, and from what a recording counted.

Plain data on the CPU and the numbers that follow from it; `reports` counts and prints.

Shapes: E experts (a task router's experts are its ranks), T tasks, r ranks, e task-embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .task import task_logits

MOST_COMPARED = 64
"""So many tasks are compared with each other; a table of all pairs grows with the square of their number."""

_BLOCK = 2**22  # logits at a time


@dataclass(frozen=True)
class RoutingCounts:
    """What a recording counted of one layer. Row 0: tokens whose task is unknown; row t + 1: task t.

    Attributes:
        usage: (T + 1, E) int64, how many tokens used each expert; padding is left out.
        tokens: (T + 1,) int64, how many tokens there were.
        entropy: (T + 1,) float64, the router's entropy added up over tokens; 1 a token where it is undecided.
    """

    usage: Tensor
    tokens: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """One adapter of one layer.

    Attributes:
        path: The layer's place in the base model.
        router: "token", "task" or "dense".
        tasks: Names, in the order of their ids; those of a token router come from the recording.
        sizes: (r, d_in, d_out).
        num_experts: E.
        update_norm: (r,) Frobenius norm of each rank's update B_j A_j, without the scale.
        balance_bias: (E,) b of a token router.
        task_embedding: (T, e) of a task router.
        chosen_rank: (T,) int64, r_t of a task router, computed from its gate.
        counts: From a recording; None: the tensors alone are known.
    """

    path: str
    router: str
    tasks: tuple[str, ...]
    sizes: tuple[int, int, int]
    num_experts: int
    update_norm: Tensor
    balance_bias: Tensor | None = None
    task_embedding: Tensor | None = None
    chosen_rank: Tensor | None = None
    counts: RoutingCounts | None = None

    @property
    def load(self) -> Tensor | None:
        """(E,) float64, tokens that used each expert; None where nothing was recorded."""
        if self.counts is None or not self.counts.tokens.sum():
            return None
        return self.counts.usage.sum(0).double()

    @property
    def relative_load(self) -> Tensor | None:
        """(E,) load over the mean load: 1 is an expert's fair share."""
        return None if (load := self.load) is None else load / load.mean().clamp(min=1e-12)

    @property
    def load_cv(self) -> float | None:
        """Standard deviation of the load over its mean; 0 is even."""
        return None if (load := self.relative_load) is None else float(load.std(correction=0))

    @property
    def load_max(self) -> float | None:
        """The largest expert's load over the mean load."""
        return None if (load := self.relative_load) is None else float(load.max())

    @property
    def load_entropy(self) -> float | None:
        """Entropy of the load over the experts, 0 (one has it all) to 1 (even)."""
        if (load := self.load) is None:
            return None
        return float(normalised_entropy(load / load.sum().clamp(min=1)))

    @property
    def routing_entropy(self) -> float | None:
        """The router's entropy for a token, in the mean: 0 (decided) to 1 (undecided)."""
        if self.counts is None or not self.counts.tokens.sum():
            return None
        return float(self.counts.entropy.sum() / self.counts.tokens.sum())

    @property
    def dead_experts(self) -> list[int] | None:
        """Experts that no token used; None where nothing was recorded."""
        return None if (load := self.load) is None else (load == 0).nonzero().flatten().tolist()

    @property
    def task_usage(self) -> Tensor | None:
        """(T, E) the share of a task's tokens that used each expert; NaN for a task that was not seen.

        Without a recording, a task router's follows from its chosen ranks.
        """
        if self.counts is not None and len(self.counts.tokens) > 1:
            tokens = self.counts.tokens[1:, None].double()
            return self.counts.usage[1:] / torch.where(tokens > 0, tokens, torch.nan)
        if self.counts is None and self.chosen_rank is not None:
            return (torch.arange(self.num_experts) < self.chosen_rank[:, None]).double()
        return None

    @property
    def task_overlap(self) -> Tensor | None:
        """(T, T) what two tasks' use of the experts has in common: Σ_i min(p_t[i], p_u[i]), 0 (nothing) to 1 (all).

        p_t is task t's usage, normalised to a distribution over the experts.
        """
        if (usage := self.task_usage) is None:
            return None
        share = usage / usage.sum(-1, keepdim=True).clamp(min=1e-12)
        return torch.stack([torch.minimum(share, own).sum(-1) for own in share])  # not (T, T, E) at once

    @property
    def embedding_similarity(self) -> Tensor | None:
        """(T, T) cosines of the task embeddings."""
        if self.task_embedding is None:
            return None
        unit = F.normalize(self.task_embedding.double(), dim=-1)
        return unit @ unit.T

    def first_tasks(self, number: int) -> LayerStatistics:
        """Return what is known of the first tasks alone."""
        if len(self.tasks) <= number:
            return self
        counts = self.counts
        if counts is not None and len(counts.tokens) > 1:
            counts = RoutingCounts(*(getattr(counts, name)[: number + 1] for name in ("usage", "tokens", "entropy")))
        return replace(
            self,
            tasks=self.tasks[:number],
            task_embedding=None if self.task_embedding is None else self.task_embedding[:number],
            chosen_rank=None if self.chosen_rank is None else self.chosen_rank[:number],
            counts=counts,
        )


def mean_similarity(layers: Iterable[LayerStatistics]) -> Tensor | None:
    """Return (T, T) cosines of the task embeddings, averaged over layers; None without a task router."""
    total, number = None, 0
    for layer in layers:
        if (similarity := layer.embedding_similarity) is not None:
            total, number = similarity if total is None else total + similarity, number + 1
    return None if total is None else total / number


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Return entropy over the last dimension divided by the largest possible one: (…, E) to (…,), 0 to 1.

    Example:
        >>> normalised_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([1., 0.])
    """
    return torch.special.entr(probabilities).sum(-1) / math.log(max(probabilities.shape[-1], 2))


def layer_statistics(
    path: str,
    tensors: Mapping[str, Tensor],
    *,
    tasks: tuple[str, ...] = (),
    counts: RoutingCounts | None = None,
) -> LayerStatistics:
    """Read one adapter of one layer off its tensors.

    Args:
        path: The layer's place in the base model.
        tensors: By the names that the adapter and its file give them: "A" (r, d_in), "B" (d_out, r), and a token
            gate's "router_weight" and "balance_bias" or a task gate's "task_embedding", "gate_weight" and "gate_bias".
        tasks: Names.
        counts: From a recording.

    Example:
        >>> layer_statistics("proj", {"A": torch.ones(2, 4), "B": torch.zeros(3, 2)}).update_norm
        tensor([0., 0.], dtype=torch.float64)
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    A, B = tensors["A"].double(), tensors["B"].double()
    num_experts = len(A)
    router, balance_bias, embedding, chosen_rank = "dense", None, None, None
    if "router_weight" in tensors:
        router, num_experts = "token", len(tensors["router_weight"])
        balance_bias = tensors["balance_bias"].clone()
    elif "gate_weight" in tensors:
        router, embedding = "task", tensors["task_embedding"].clone()
        gate = tensors["gate_weight"], tensors["gate_bias"]
        ids = torch.arange(len(embedding)).split(max(1, _BLOCK // len(A)))
        chosen_rank = torch.cat([1 + task_logits(embedding, *gate, some).argmax(-1) for some in ids])  # as TaskGate
    return LayerStatistics(
        path=path,
        router=router,
        tasks=tasks,
        sizes=(A.shape[0], A.shape[1], B.shape[0]),
        num_experts=num_experts,
        update_norm=A.norm(dim=1) * B.norm(dim=0),
        balance_bias=balance_bias,
        task_embedding=embedding,
        chosen_rank=chosen_rank,
        counts=counts,
    )
