"""The token gate of SMoRA (arXiv 2501.15103, section 3): every token activates its top_k experts.

Scores and selections are computed in float32 (float64 for float64 inputs) whatever the model's dtype: in bfloat16 a
third of the tokens would choose other experts.

Shapes: N tokens, d_in input features, r ranks, E experts, k active experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .choice import Routing

SMALLEST_KEY = 2.0**-20
"""What a chosen expert's score + b counts in a biased gate at least. Below 0 it would turn the sign of its gate, and a
sum of 0 would make the gates infinite; the published code guards against neither. Exact in every floating-point type.
"""


class TokenGate(NamedTuple):
    """A token gate: an adapter's tensors and its constants.

    Attributes:
        weight: (E, d_in) W_g.
        balance_bias: (E,) b, float32.
        top_k: k, active experts a token.
        expert_rank: Ranks an expert.
        score_function: "sigmoid" or "softmax".
        biased_gates: The balancing bias enters the gates' values too; see `SMALLEST_KEY`.

    Example:
        >>> TokenGate(torch.randn(8, 16), torch.zeros(8), top_k=2).route(torch.randn(5, 16)).indices.shape
        torch.Size([5, 2])
    """

    weight: Tensor
    balance_bias: Tensor
    top_k: int
    expert_rank: int = 1
    score_function: str = "sigmoid"
    biased_gates: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return self.balance_bias.shape[0]

    def logits(self, x: Tensor) -> Tensor:
        """Return z = x W_gᵀ, (N, E), in float32 or better for x (N, d_in) of any dtype, autocast or not."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def route(self, x: Tensor) -> Routing:
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
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort; its TopK, other than torch's, promises that of equal keys the lower index wins.
        return keys.topk(top_k, dim=-1).indices
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
        biased_gates: Let b enter the values too, as the published SMoRA code does, down to `SMALLEST_KEY`.

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
        chosen = keys.gather(-1, indices).clamp(min=SMALLEST_KEY)
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
