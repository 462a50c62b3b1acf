"""The token gate between the two products, in PyTorch: select, weigh, save compactly, and its derivative.

The op's two wide products (x · [A; W_g]ᵀ before, u · Bᵀ after) are matrix products that the vendor's library does
best. What lies between them is bound by memory and by launches, and is what an implementation may replace: this file
says it in PyTorch, `triton_kernels.py` with the same signatures in Triton.

Shapes: N tokens, r ranks, E experts of ρ = r / E ranks, k active experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many tokens one stable sort costs less than packing the keys.
_FEW_TOKENS = 32

# Here no separate path for decoding pays; `triton_kernels.py` has one.
DECODE_TOKENS = 0


class GateSpec(NamedTuple):
    """The token gate's constants.

    Attributes:
        top_k: k.
        score_function: "sigmoid" or "softmax".
        biased_gates: The balancing bias enters the values too.
        scale: s, folded into the gates.
    """

    top_k: int
    score_function: str
    biased_gates: bool
    scale: float

    @property
    def divides(self) -> bool:
        """Whether gates are keys over their sum; otherwise they are a softmax of log-scores."""
        return self.biased_gates and self.score_function == "sigmoid"


class Chosen(NamedTuple):
    """What backward needs to know of the gate, and all that is kept of it.

    Attributes:
        indices: (N, k) chosen experts, uint8 where E ≤ 256.
        values: (N, k) what the gates are computed from: log-scores, or keys where `GateSpec.divides`.
        projections: (N, k · ρ) the chosen columns of x Aᵀ.
    """

    indices: Tensor
    values: Tensor
    projections: Tensor


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


def selection_keys(logits: Tensor, balance_bias: Tensor, spec: GateSpec) -> Tensor:
    """Return (N, E) what the choice is made by: score + b ("softmax": z + b)."""
    return logits.sigmoid().add_(balance_bias) if spec.score_function == "sigmoid" else logits + balance_bias


def forward(logits: Tensor, projection: Tensor, balance_bias: Tensor, spec: GateSpec) -> tuple[Tensor, Tensor, Chosen]:
    """Gate the projections.

    Args:
        logits: (N, E) z, float32 or float64.
        projection: (N, r) x Aᵀ in the dtype that the adapter computes in.
        balance_bias: (E,) b.
        spec: The gate.

    Returns:
        u (N, r) = s · g ⊙ projection; indices (N, k) int64; what to save for backward.
    """
    num_ranks = projection.shape[1]
    keys = selection_keys(logits, balance_bias, spec)
    indices = select(keys, spec.top_k)
    values = _values(keys if spec.biased_gates else logits, indices, spec)
    ranks = _ranks(indices, num_ranks // logits.shape[1])
    projections = projection.gather(1, ranks)
    gates = gate_weights(values, spec) * (spec.top_k * spec.scale)
    u = _spread(projections * _per_rank(gates, ranks).to(projection.dtype), ranks, num_ranks)
    return (
        u,
        indices,
        Chosen(_narrow(indices, logits.shape[1]), _compact(values, values_dtype(projection.dtype, spec)), projections),
    )


def backward(
    dy: Tensor, B: Tensor, chosen: Chosen, balance_bias: Tensor | None, spec: GateSpec, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Differentiate u Bᵀ and the gate.

    Args:
        dy: (N, d_out) in the dtype that the adapter computes in.
        B: (d_out, r) in the same dtype.
        chosen: From `forward`.
        balance_bias: (E,) b as it was in forward; needed where `GateSpec.divides`.
        spec: The gate.
        num_experts: E.

    Returns:
        [dp, dz] (N, r + E), the gradients of projection and logits; and dBᵀ (r, d_out).
    """
    num_tokens, num_ranks = len(dy), B.shape[1]
    indices = chosen.indices.long()
    ranks = _ranks(indices, num_ranks // num_experts)
    weights = gate_weights(chosen.values, spec)
    gates = _per_rank(weights * (spec.top_k * spec.scale), ranks).to(dy.dtype)
    u = _spread(chosen.projections * gates, ranks, num_ranks)
    du = (dy @ B).gather(1, ranks)
    products = du.to(weights.dtype) * chosen.projections.to(weights.dtype)
    dweights = products.view(num_tokens, spec.top_k, -1).sum(-1) if num_tokens else products[:, : spec.top_k]
    # The derivative of a normalisation over the chosen: what all of them share cancels.
    shared = dweights - (dweights * weights).sum(-1, keepdim=True)
    dz = shared.mul_(spec.top_k * spec.scale) * _slope(chosen.values, weights, indices, balance_bias, spec)
    both = dy.new_zeros(num_tokens, num_ranks + num_experts)
    both.scatter_(1, ranks, du.mul_(gates)).scatter_(1, indices + num_ranks, dz.to(dy.dtype))
    return both, u.t() @ dy


def gate_weights(values: Tensor, spec: GateSpec) -> Tensor:
    """Return (N, k) weights that add up to 1, in float32 or better; the gates are k times these."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values / values.sum(-1, keepdim=True) if spec.divides else values.softmax(-1)


def values_dtype(dtype: torch.dtype, spec: GateSpec) -> torch.dtype | None:
    """Return what `Chosen.values` are saved in where the adapter computes in `dtype`; None: as they are.

    Log-scores of an adapter that computes in 16 bits need no more than float16's 11: its gates have fewer or as many.
    """
    return torch.float16 if dtype.itemsize == 2 and spec.score_function == "sigmoid" and not spec.divides else None


def _values(keys: Tensor, indices: Tensor, spec: GateSpec) -> Tensor:
    chosen = keys.gather(1, indices)
    return F.logsigmoid(chosen) if spec.score_function == "sigmoid" and not spec.divides else chosen


def _compact(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.clamp(min=-6e4).to(dtype)


def _slope(values: Tensor, weights: Tensor, indices: Tensor, balance_bias: Tensor | None, spec: GateSpec) -> Tensor:
    # d weight / d z up to the normalisation.
    if spec.score_function == "softmax":
        return weights
    if not spec.divides:
        return weights * -torch.expm1(values.to(weights.dtype))  # 1 − sigmoid(z), from log sigmoid(z)
    assert balance_bias is not None
    score = values - balance_bias[indices]
    return score * (1 - score) / values.sum(-1, keepdim=True)


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


def _narrow(indices: Tensor, num_experts: int) -> Tensor:
    return indices.to(torch.uint8 if num_experts <= 256 else torch.int32)
