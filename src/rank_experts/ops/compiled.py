"""The op as `torch.library` knows it: an adapted layer's update is one node of a compiled graph, one of its backward.

A compiler cannot look into it and does not have to: which backend runs is decided when the graph runs, as it is
without a compiler. The nodes allocate what they return, since a graph's nodes may not write into their inputs.

Shapes as in `operands.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..routing.token import TokenGate
from .backends import choose
from .backends.gate import index_dtype, values_dtype
from .backends.pytorch import no_autocast
from .operands import Kept, Needed, Operands


def update(y: Tensor, op: Operands) -> tuple[Tensor, Tensor | None]:
    """Return the base layer's output y plus the update, and a token gate's chosen experts (N, k)."""
    if isinstance(op.gate, TokenGate):
        constants = (op.gate.top_k, op.gate.score_function, op.gate.biased_gates, op.scale, op.dtype)
        y, _, indices, _ = torch.ops.rank_experts.forward(y, *op.tensors(), *constants)
        return y, indices.long()
    return torch.ops.rank_experts.forward(
        y, op.source, None, op.A, op.B, op.gate, None, 0, "", False, op.scale, op.dtype
    )[0], None


@torch.library.custom_op("rank_experts::forward", mutates_args=())
def forward(
    y: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    balance_bias: Tensor | None,
    top_k: int,
    score_function: str,
    biased_gates: bool,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y + s · (g ⊙ (x Aᵀ)) Bᵀ and `Kept`, empty where there is nothing. `top_k` is 0 without a token gate."""
    op = _operands((x, dropped, A, B, gate, balance_bias), top_k, score_function, biased_gates, scale, dtype)
    with no_autocast(x):
        y, _, kept = choose(op).forward(op, y.contiguous(), False)
    return y, *(x.new_empty(0) if each is None else each for each in kept)  # type: ignore[return-value]


@forward.register_fake
def _(y, x, dropped, A, B, gate, balance_bias, top_k, score_function, biased_gates, scale, dtype):
    op = _operands((x, dropped, A, B, gate, balance_bias), top_k, score_function, biased_gates, scale, dtype)
    num_tokens, made = math.prod(x.shape[:-1]), x.new_empty
    if not isinstance(op.gate, TokenGate):
        return y.new_empty(y.shape), made(num_tokens, op.num_used, dtype=dtype), made(0), made(0)
    logits = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    return (
        y.new_empty(y.shape),
        made(num_tokens, top_k * (A.shape[0] // gate.shape[0]), dtype=dtype),
        made(num_tokens, top_k, dtype=index_dtype(gate.shape[0])),
        made(num_tokens, top_k, dtype=values_dtype(dtype, op.gate) or logits),
    )


@torch.library.custom_op("rank_experts::backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    balance_bias: Tensor | None,
    projections: Tensor,
    indices: Tensor,
    values: Tensor,
    top_k: int,
    score_function: str,
    biased_gates: bool,
    scale: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return those of the gradients of x, dropped, A, B and the gate's tensor that are `needed`."""
    op = _operands((x, dropped, A, B, gate, balance_bias), top_k, score_function, biased_gates, scale, dtype)
    with no_autocast(x):
        found = choose(op).backward(op, Kept(projections, indices, values), dy, None, Needed(*needed))
    # The results of a node may not be views of one another.
    return [
        (each.clone() if each.untyped_storage().nbytes() > each.nbytes else each).view(tensor.shape)
        for tensor, each in zip(op.tensors(), found)
        if tensor is not None and each is not None
    ]


@backward.register_fake
def _(dy, x, dropped, A, B, gate, *rest):
    return [each.new_empty(each.shape) for each, asked in zip((x, dropped, A, B, gate), rest[-1]) if asked]


def _operands(
    tensors: Sequence[Tensor | None],
    top_k: int,
    score_function: str,
    biased_gates: bool,
    scale: float,
    dtype: torch.dtype,
) -> Operands:
    x, dropped, A, B, gate, bias = tensors
    if top_k:
        constants = dict(score_function=score_function, biased_gates=biased_gates)
        gate = TokenGate(gate, bias, top_k, **constants)  # type: ignore[arg-type, assignment]
    return Operands(x, dropped, A, B, gate, scale, dtype)  # type: ignore[arg-type]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, dropped, A, B, gate, bias, *constants = inputs
    # The bias moves between steps; where it is part of the gates, backward needs it as it was.
    bias = bias.clone() if constants[2] else None
    ctx.save_for_backward(x, dropped, A, B, gate, bias, *output[1:])
    ctx.constants = constants
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = [bool(each) for each in ctx.needs_input_grad]
    if dy is None:
        return (None,) * len(needed)
    found = iter(backward(dy, *ctx.saved_tensors, *ctx.constants, needed[1:6]))
    gradients = [next(found) if each else None for each in needed[1:6]]
    return (dy if needed[0] else None, *gradients, *(None,) * 6)


forward.register_autograd(_gradients, setup_context=_save)
