"""The op's derivative from the plain formula, for a backward that must itself be differentiated (create_graph)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gate as torch_gate
from .gate import Chosen, GateSpec
from .products import Base, gate_rows, no_autocast, output_gradient


def token_update(
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor | None,
    chosen: Chosen,
    spec: GateSpec,
    base: Base,
) -> Tensor:
    """Return the update (N, d_out) from the plain formula, with the choice that forward made."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    indices = chosen.indices.long()
    with no_autocast(x):
        logits = F.linear(x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)).gather(1, indices)
        if spec.score_function == "sigmoid":
            values = logits.sigmoid() if spec.biased_gates else F.logsigmoid(logits)
        else:
            values = logits
        if balance_bias is not None:
            values = values + balance_bias[indices]
        weights = torch_gate.gate_weights(values, spec) * (spec.top_k * spec.scale)
        gates = torch.zeros(len(weights), len(weight), dtype=dtype, device=x.device).scatter(1, indices, weights)
    return given_update(x, dropped, A, B, gates.repeat_interleave(len(A) // len(weight), 1), 1.0, base)


def given_update(
    x: Tensor | None, dropped: Tensor | None, A: Tensor, B: Tensor, gates: Tensor | None, scale: float, base: Base
) -> Tensor:
    """Return the update (N, d_out) from the plain formula."""
    source = x if dropped is None else dropped
    assert source is not None
    with no_autocast(source):
        u = F.linear(source.reshape(-1, source.shape[-1]).to(base.dtype), A.to(base.dtype))
        u = u * scale if gates is None else u * gate_rows(gates * scale, u)
        return F.linear(u, B.to(base.dtype))


def differentiable(
    update: Tensor,
    dy: Tensor,
    base_weight: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    base: Base,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dropped, tensor, A, B and the last of `inputs`, with a graph of their own."""
    x, dropped, *rest = inputs
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    flat = dy.reshape(-1, dy.shape[-1])
    found = iter(torch.autograd.grad(update, wanted, flat.to(update.dtype), create_graph=True, allow_unused=True))
    gradients = [next(found) if t is not None and t.requires_grad else None for t in (x, dropped, *rest)]
    if needed[0] and base_weight is not None:
        through_base = flat @ (base_weight.t() if base.transposed else base_weight)
        through_base = through_base.view((*dy.shape[:-1], through_base.shape[-1]))
        gradients[0] = through_base if gradients[0] is None else gradients[0] + through_base
    return gradients[0], gradients[1], output_gradient(dy, base, needed), *gradients[2:]
