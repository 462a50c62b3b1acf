"""The gates: which ranks a token or a task uses, and the losses that train the choice.

Routers hold parameters and compute; they remember nothing between calls. Whatever a caller wants to know of a choice
is in the `Routing` that it gets back. Scores and selections are computed in float32 (float64 for float64 inputs)
whatever the model's dtype: in bfloat16 a third of the tokens would choose other experts.

Shapes: N tokens, d_in input features, r ranks, E experts, k active experts, T tasks, e task-embedding width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        gates: (N, r) weight of every rank; 0 where a rank is not used. One row a token from a token router, one row
            a task id from a task router.
        indices: (N, k) chosen experts, best first, from a token router; (N,) chosen rank r_t, 1…r, from a task router.
        probabilities: (N, E) or (N, r): the router's distribution, for auxiliary losses and reports.
    """

    gates: Tensor
    indices: Tensor
    probabilities: Tensor


def select_experts(keys: Tensor, top_k: int) -> Tensor:
    """Return the indices of the top_k largest keys, best first; of equal keys the lower index wins.

    `torch.topk` orders equals arbitrarily, so a stable sort does it. A NaN counts as the largest key, so that it
    is selected and makes the gates NaN rather than vanish.

    Args:
        keys: (N, E).
        top_k: How many.

    Returns:
        (N, top_k) int64.

    Example:
        >>> select_experts(torch.tensor([[0.5, 0.9, 0.9]]), 2)
        tensor([[1, 2]])
    """
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :top_k]


def token_routing(
    logits: Tensor,
    balance_bias: Tensor,
    *,
    top_k: int,
    expert_rank: int = 1,
    score_function: str = "sigmoid",
    biased_gates: bool = False,
) -> Routing:
    """Choose top_k experts a token and weigh them (SMoRA, arXiv 2501.15103, section 3; selection bias: 2408.15664).

    The gates are k · score / Σ chosen scores, written as a softmax over the chosen log-scores, which is the same
    function and does not divide zero by zero where all scores vanish.

    Args:
        logits: (N, E) router outputs z.
        balance_bias: (E,) b; added to the scores (softmax: to z) for the choice only, unless `biased_gates`.
        top_k: Active experts a token.
        expert_rank: Ranks an expert; the gate of an expert is repeated for each.
        score_function: "sigmoid" or "softmax".
        biased_gates: Let b enter the values too, as the published SMoRA code does.

    Returns:
        Routing with gates (N, E · expert_rank), indices (N, top_k), probabilities (N, E). A NaN logit makes all
        gates of its token NaN.

    Example:
        >>> token_routing(torch.tensor([[2.0, -1.0, 2.0]]), torch.zeros(3), top_k=2).gates
        tensor([[1., 0., 1.]])
    """
    log_scores = F.logsigmoid(logits) if score_function == "sigmoid" else logits
    keys = (logits.sigmoid() if score_function == "sigmoid" else logits) + balance_bias
    indices = select_experts(keys.detach(), top_k)
    if biased_gates and score_function == "sigmoid":
        chosen = keys.gather(-1, indices)
        weights = chosen / chosen.sum(-1, keepdim=True)
    else:
        weights = (keys if biased_gates else log_scores).gather(-1, indices).softmax(-1)
    gates = torch.zeros_like(logits).scatter(-1, indices, top_k * weights)
    return Routing(gates.repeat_interleave(expert_rank, dim=-1), indices, log_scores.softmax(-1))


def expert_load(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Count how many tokens chose each expert.

    Args:
        indices: (N, k) chosen experts.
        num_experts: E.
        mask: (N,) true where a token counts; None: all do.

    Returns:
        (E,) float32, exact up to 2^24 tokens a call.

    Example:
        >>> expert_load(torch.tensor([[0, 2], [2, 1]]), 4)
        tensor([1., 1., 2., 0.])
    """
    ones = torch.ones_like(indices, dtype=torch.float32) if mask is None else mask[:, None].float().expand_as(indices)
    load = torch.zeros(num_experts, dtype=torch.float32, device=indices.device)
    return load.scatter_add_(0, indices.reshape(-1), ones.reshape(-1))


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
        >>> routing = token_routing(torch.zeros(4, 2), torch.zeros(2), top_k=2)
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


def pool_examples(x: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Reduce each example's tokens to one vector.

    Args:
        x: (B, L, d).
        mask: (B, L) true where a token is not padding; None: all are tokens.
        pooling: "mean" over the tokens, the "first" or the "last" of them, wherever the padding lies.

    Returns:
        (B, d); zeros for an example that is all padding.

    Example:
        >>> pool_examples(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
        tensor([[2.]])
    """
    if pooling == "mean" and mask is None:
        return x.sum(1) / max(x.shape[1], 1)
    weight = torch.ones(x.shape[:2], device=x.device, dtype=x.dtype) if mask is None else mask.to(x.dtype)
    if pooling == "mean":
        with torch.autocast(x.device.type, enabled=False):
            total = torch.bmm(weight[:, None], x).squeeze(1)  # No product of x's size in between.
        return total / weight.sum(1, keepdim=True).clamp(min=1)
    order = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    position = ((order.flip(0) if pooling == "first" else order) * weight).argmax(1)
    picked = x[torch.arange(len(x), device=x.device), position]
    return picked * weight.amax(1, keepdim=True)


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
        (B, d), zeros for an example that has no token here; and (B,) whether it has one.

    Example:
        >>> pooled, present = pool_gathered(
        ...     torch.tensor([[1.0], [3.0]]), torch.tensor([2, 2]), torch.tensor([4, 5]), 3, None, "mean"
        ... )
        >>> pooled.flatten().tolist(), present.tolist()
        ([0.0, 0.0, 2.0], [False, False, True])
    """
    chosen = torch.ones_like(examples, dtype=torch.bool) if mask is None else mask
    if pooling != "mean":
        order = (positions + 1 if pooling == "last" else -positions - 1).masked_fill(~chosen, -(2**62))
        best = order.new_full((num_examples,), -(2**62)).scatter_reduce(0, examples, order, "amax")
        chosen = chosen & (order == best[examples])
    count = x.new_zeros(num_examples).index_add(0, examples, chosen.to(x.dtype))
    total = x.new_zeros(num_examples, x.shape[-1]).index_add(0, examples, torch.where(chosen[:, None], x, 0))
    return total / count[:, None].clamp(min=1), count > 0


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
    """Choose each task's ranks by the logits (N, r) of `task_logits`; see `TaskRouter`.

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
    if rank_scaling == "task":
        gates = gates * (best + 1).to(logits.dtype) / num_tasks
    elif rank_scaling == "rank":
        gates = gates * ((rank + 1).to(logits.dtype) / num_ranks).square()
    return Routing(gates, best.squeeze(-1) + 1, probabilities)


class TokenRouter(nn.Module):
    """The token gate of SMoRA: z = x W_gᵀ, then `token_routing`.

    Args:
        d_in: Input features.
        num_experts: E.
        top_k: Active experts a token.
        expert_rank: Ranks an expert.
        score_function: "sigmoid" or "softmax".
        biased_gates: Let the balancing bias enter the gates' values.

    Attributes:
        weight: (E, d_in) W_g, a parameter.
        balance_bias: (E,) b, a buffer that stays float32 through every cast: 0.5 + 1e-3 is 0.5 in bfloat16.

    Example:
        >>> TokenRouter(d_in=16, num_experts=8, top_k=2)(torch.randn(5, 16)).indices.shape
        torch.Size([5, 2])
    """

    balance_bias: Tensor

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        top_k: int,
        expert_rank: int = 1,
        score_function: str = "sigmoid",
        biased_gates: bool = False,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.expert_rank = expert_rank
        self.score_function = score_function
        self.biased_gates = biased_gates
        self.weight = nn.Parameter(torch.empty(num_experts, d_in))
        self.register_buffer("balance_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """E."""
        # Not the weight's: between forwards DeepSpeed's ZeRO-3 leaves a parameter empty.
        return self.balance_bias.shape[0]

    def reset_parameters(self) -> None:
        """Draw W_g as `nn.Linear` does, Kaiming-uniform with a = √5, and set the bias to zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.balance_bias)

    def logits(self, x: Tensor) -> Tensor:
        """Return z = x W_gᵀ, (N, E), in float32 or better for x (N, d_in) of any dtype, autocast or not."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def forward(self, x: Tensor) -> Routing:
        """Route tokens.

        Args:
            x: (N, d_in), the layer's input before dropout.

        Returns:
            Routing: gates (N, r), indices (N, k), probabilities (N, E).
        """
        return token_routing(
            self.logits(x),
            self.balance_bias,
            top_k=self.top_k,
            expert_rank=self.expert_rank,
            score_function=self.score_function,
            biased_gates=self.biased_gates,
        )

    def _apply(self, fn, recurse: bool = True):
        before = self.balance_bias
        super()._apply(fn, recurse)
        after = self.balance_bias
        # From the value before the cast, where there is one: casting down and up again would round it.
        keep = after if before.is_meta or after.is_meta else before
        self.balance_bias = keep.to(device=after.device, dtype=torch.float32)
        return self

    def extra_repr(self) -> str:
        """Show what `repr` of the model prints."""
        return (
            f"d_in={self.weight.shape[1]}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"expert_rank={self.expert_rank}, score_function={self.score_function!r}"
        )


class TaskRouter(nn.Module):
    """The task gate of MoRE: every task chooses a rank r_t and uses ranks 1…r_t (arXiv 2505.22694, section 3).

    p_t = softmax(W e_t + c), r_t = 1 + argmax p_t, and g_j = [j ≤ r_t] · (1 + p_t[r_t] − stop_gradient(p_t[r_t])):
    the gate is 1 in the forward and passes the gradient to the choice's probability (straight-through). The published
    code leaves the last factor out, so that neither its gate nor its embeddings receive a gradient from the task.

    Args:
        d_in: Input features.
        r: Ranks to choose from.
        num_tasks: T.
        embedding_dim: e; None: d_in. Where it differs from d_in, `projection` maps pooled inputs to it for the
            contrastive loss.
        rank_scaling: "task" multiplies a task's gates by r_t / T (the paper's linear scaling), "rank" multiplies
            rank j by (j / r)² (the published code), "none" leaves them.

    Attributes:
        task_embedding: (T, e).
        gate_weight: (r, e) W.
        gate_bias: (r,) c.
        projection: (e, d_in), or None where e = d_in.

    Example:
        >>> TaskRouter(d_in=16, r=8, num_tasks=3)(torch.tensor([0, 2])).gates.shape
        torch.Size([2, 8])
    """

    projection: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        r: int,
        num_tasks: int,
        embedding_dim: int | None = None,
        rank_scaling: str = "task",
    ) -> None:
        super().__init__()
        embedding_dim = embedding_dim or d_in
        self.rank_scaling = rank_scaling
        self.task_embedding = nn.Parameter(torch.empty(num_tasks, embedding_dim))
        self.gate_weight = nn.Parameter(torch.empty(r, embedding_dim))
        self.gate_bias = nn.Parameter(torch.empty(r))
        projection = None if embedding_dim == d_in else nn.Parameter(torch.empty(embedding_dim, d_in))
        self.register_parameter("projection", projection)
        self.reset_parameters()

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.task_embedding.shape[0]

    @property
    def r(self) -> int:
        """Ranks to choose from."""
        return self.gate_weight.shape[0]

    def reset_parameters(self) -> None:
        """Draw embeddings as `nn.Embedding` does and the rest as `nn.Linear` does."""
        nn.init.normal_(self.task_embedding)
        nn.init.kaiming_uniform_(self.gate_weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.gate_weight.shape[1])
        nn.init.uniform_(self.gate_bias, -bound, bound)
        if self.projection is not None:
            nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))

    def forward(self, task_ids: Tensor) -> Routing:
        """Route tasks.

        Args:
            task_ids: (N,) int64.

        Returns:
            Routing: gates (N, r) with the rank scaling in them, indices (N,) the chosen ranks r_t in 1…r,
            probabilities (N, r).
        """
        logits = task_logits(self.task_embedding, self.gate_weight, self.gate_bias, task_ids)
        return task_routing(logits, self.num_tasks, self.rank_scaling)

    def contrast(self, examples: Tensor, task_ids: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
        """Return the contrastive loss of pooled inputs (B, d_in) with their tasks (B,); see `contrastive_loss`."""
        dtype = torch.promote_types(self.task_embedding.dtype, torch.float32)
        with torch.autocast(examples.device.type, enabled=False):
            examples = examples.to(dtype)
            if self.projection is not None:
                examples = F.linear(examples, self.projection.to(dtype))
            return contrastive_loss(examples, self.task_embedding.to(dtype), task_ids, temperature, mask)

    def extra_repr(self) -> str:
        """Show what `repr` of the model prints."""
        return (
            f"r={self.r}, num_tasks={self.num_tasks}, embedding_dim={self.task_embedding.shape[1]}, "
            f"rank_scaling={self.rank_scaling!r}"
        )
