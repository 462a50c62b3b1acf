"""The token gate between the two products, in PyTorch: select, weigh, save compactly, and its derivative.

The op's two wide products (x · [A; W_g]ᵀ before, u · Bᵀ after) are matrix products that the vendor's library does
best. What lies between them is bound by memory and by launches, and is what a backend may replace: this file says it
in PyTorch, `triton/kernels.py` with the same two signatures in Triton.

Shapes: N tokens, r ranks, E experts of ρ = r / E ranks, k active experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...routing.token import SMALLEST_KEY, TokenGate
from ..operands import Kept

# Below this many tokens one stable sort costs less than packing the keys.
_FEW_TOKENS = 32


def select(keys: Tensor, top_k: int) -> Tensor:
    """Return what `routing.select_experts` returns, faster.

    `torch.topk` orders equals arbitrarily, which does not matter where there are none. For the tokens that have some,
    float32 keys and the experts' numbers are packed into one int64, so that it has no choice.

    Args:
        keys: (N, E) float32 or float64.
        top_k: k.

    Returns:
        (N, k) int64, best first, the lower index first among equals; a NaN is the largest key.

    Example:
        >>> select(torch.tensor([[0.5, 0.9, 0.9]]), 2)
        tensor([[1, 2]])
    """
    if keys.dtype != torch.float32 or len(keys) <= _FEW_TOKENS:
        return torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :top_k]
    if keys.device.type != "cpu":  # An accelerator would have to be waited for.
        return _select_packed(keys, top_k)
    values, indices = keys.topk(min(top_k + 1, keys.shape[-1]), dim=-1)
    chosen, ordered = indices[:, :top_k], (values[:, :-1] > values[:, 1:]).all(-1)
    if not bool(ordered.all()):
        rows = ordered.logical_not_().nonzero().squeeze(-1)
        chosen[rows] = _select_packed(keys[rows], top_k)
    return chosen


def _select_packed(keys: Tensor, top_k: int) -> Tensor:
    # A NaN of either sign becomes the positive one, and −0 becomes 0, as a comparison of floats has it.
    bits = torch.where(keys.isnan(), torch.nan, keys + 0.0).view(torch.int32)
    # Two's complement orders negative floats backwards: flip all but their sign.
    bits = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    num_experts = keys.shape[-1]
    later_first = torch.arange(num_experts - 1, -1, -1, device=keys.device)
    packed = torch.add(later_first, bits.long(), alpha=num_experts)
    return packed.topk(top_k, dim=-1).indices


def selection_keys(logits: Tensor, gate: TokenGate) -> Tensor:
    """Return (N, E) what the choice is made by: score + b ("softmax": z + b)."""
    return logits.sigmoid().add_(gate.balance_bias) if gate.score_function == "sigmoid" else logits + gate.balance_bias


def divides(gate: TokenGate) -> bool:
    """Say whether the gates are keys over their sum; otherwise they are a softmax of log-scores."""
    return gate.biased_gates and gate.score_function == "sigmoid"


def forward(logits: Tensor, projection: Tensor, gate: TokenGate, scale: float) -> tuple[Tensor, Tensor, Kept]:
    """Gate the projections.

    Args:
        logits: (N, E) z, float32 or float64.
        projection: (N, r) x Aᵀ in the dtype that the adapter computes in.
        gate: The gate.
        scale: s.

    Returns:
        u (N, r) = s · g ⊙ projection; indices (N, k) int64; what to keep for backward.
    """
    num_ranks, num_experts = projection.shape[1], logits.shape[1]
    keys = selection_keys(logits, gate)
    indices = select(keys, gate.top_k)
    values = (keys if gate.biased_gates else logits).gather(1, indices)
    if divides(gate):
        values = values.clamp(min=SMALLEST_KEY)
    elif gate.score_function == "sigmoid":
        values = F.logsigmoid(values)
    ranks = _ranks(indices, num_ranks // num_experts)
    projections = projection.gather(1, ranks)
    gates = weights(values, gate) * (gate.top_k * scale)
    u = _spread(projections * _per_rank(gates, ranks).to(projection.dtype), ranks, num_ranks)
    if (kept := values_dtype(projection.dtype, gate)) is not None:
        values = values.clamp(min=-6e4).to(kept)
    return u, indices, Kept(projections, indices.to(index_dtype(num_experts)), values)


def backward(dy: Tensor, B: Tensor, kept: Kept, gate: TokenGate, scale: float) -> tuple[Tensor, Tensor]:
    """Differentiate u Bᵀ and the gate.

    Args:
        dy: (N, d_out) in the dtype that the adapter computes in.
        B: (d_out, r) in the same dtype.
        kept: From `forward`.
        gate: The gate; its balancing bias as it was in forward, needed only where the gate `divides`.
        scale: s.

    Returns:
        [dp, dz] (N, r + E), the gradients of projection and logits; and dBᵀ (r, d_out).
    """
    assert kept.indices is not None
    assert kept.values is not None
    num_tokens, num_ranks, num_experts, factor = len(dy), B.shape[1], len(gate.weight), gate.top_k * scale
    indices = kept.indices.long()
    ranks = _ranks(indices, num_ranks // num_experts)
    shares = weights(kept.values, gate)
    gates = _per_rank(shares * factor, ranks).to(dy.dtype)
    u = _spread(kept.projections * gates, ranks, num_ranks)
    du = (dy @ B).gather(1, ranks)
    products = du.to(shares.dtype) * kept.projections.to(shares.dtype)
    dshares = products.view(num_tokens, gate.top_k, -1).sum(-1) if num_tokens else products[:, : gate.top_k]
    # The derivative of a normalisation over the chosen: what all of them share cancels.
    common = dshares - (dshares * shares).sum(-1, keepdim=True)
    dz = common.mul_(factor) * _slope(kept.values, shares, indices, gate)
    both = dy.new_zeros(num_tokens, num_ranks + num_experts)
    both.scatter_(1, ranks, du.mul_(gates)).scatter_(1, indices + num_ranks, dz.to(dy.dtype))
    return both, u.t() @ dy


def weights(values: Tensor, gate: TokenGate) -> Tensor:
    """Return (N, k) weights that add up to 1, in float32 or better; the gates are k times these."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values / values.sum(-1, keepdim=True) if divides(gate) else values.softmax(-1)


def values_dtype(dtype: torch.dtype, gate: TokenGate) -> torch.dtype | None:
    """Return what `Kept.values` are kept in where the adapter computes in `dtype`; None: as they are.

    Log-scores of an adapter that computes in 16 bits need no more than float16's 11: its gates have fewer or as many.
    """
    return torch.float16 if dtype.itemsize == 2 and gate.score_function == "sigmoid" and not divides(gate) else None


def index_dtype(num_experts: int) -> torch.dtype:
    """Return what `Kept.indices` are kept in."""
    return torch.uint8 if num_experts <= 256 else torch.int32


def _slope(values: Tensor, shares: Tensor, indices: Tensor, gate: TokenGate) -> Tensor:
    # d share / d z up to the normalisation.
    if gate.score_function == "softmax":
        return shares
    if not divides(gate):
        return shares * -torch.expm1(values.to(shares.dtype))  # 1 − sigmoid(z), from log sigmoid(z)
    score = values - gate.balance_bias[indices]
    slope = torch.where(values > SMALLEST_KEY, score * (1 - score), 0.0 * values)  # NaN stays
    return slope / values.sum(-1, keepdim=True)


def _spread(gated: Tensor, ranks: Tensor, num_ranks: int) -> Tensor:
    return gated.new_zeros(len(ranks), num_ranks).scatter_(1, ranks, gated)


def _per_rank(weights: Tensor, ranks: Tensor) -> Tensor:
    expert_rank = ranks.shape[1] // weights.shape[1]
    return weights if expert_rank == 1 else weights.repeat_interleave(expert_rank, 1)


def _ranks(indices: Tensor, expert_rank: int) -> Tensor:
    if expert_rank == 1:
        return indices
    within = torch.arange(expert_rank, device=indices.device)
    return (indices[..., None] * expert_rank + within).flatten(1)
