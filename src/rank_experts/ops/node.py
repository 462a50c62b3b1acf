"""The op as `torch.library` knows it: an adapted layer's update is one node of a compiled graph, one of its backward.

A compiler cannot look into it and does not have to: which kernels run is decided when the graph runs, as it is
without a compiler. The nodes allocate what they return, since a graph's nodes may not write into their inputs.

Shapes as in `products.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import gate_kernels, given_kernels
from .gate import Chosen, GateSpec, values_dtype
from .products import Base, given_backward, given_forward, token_backward, token_forward


@torch.library.custom_op("rank_experts::token_gated", mutates_args=())
def token_gated(
    y: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    top_k: int,
    score_function: str,
    biased_gates: bool,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y + s · (g ⊙ (dropped Aᵀ)) Bᵀ with a token gate, and what backward needs: see `fused.token_gated`."""
    spec = GateSpec(top_k, score_function, biased_gates, scale)
    kernels = gate_kernels(x, A, B, weight, top_k, dtype)
    y, _, chosen = token_forward(
        x, dropped, y.contiguous(), A, B, weight, balance_bias, spec, _apart(dtype), kernels, True
    )
    return y, *chosen  # type: ignore[return-value]


@token_gated.register_fake
def _(y, x, dropped, A, B, weight, balance_bias, top_k, score_function, biased_gates, scale, dtype):
    num_tokens, (num_experts, _), num_ranks = math.prod(x.shape[:-1]), weight.shape, A.shape[0]
    logits = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    spec = GateSpec(top_k, score_function, biased_gates, scale)
    return (
        y.new_empty(y.shape),
        x.new_empty(num_tokens, top_k, dtype=torch.uint8 if num_experts <= 256 else torch.int32),
        x.new_empty(num_tokens, top_k, dtype=values_dtype(dtype, spec) or logits),
        x.new_empty(num_tokens, top_k * (num_ranks // num_experts), dtype=dtype),
    )


@torch.library.custom_op("rank_experts::token_gated_backward", mutates_args=())
def token_gated_backward(
    dy: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
    projections: Tensor,
    top_k: int,
    score_function: str,
    biased_gates: bool,
    scale: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return those of the gradients of x, dropped, A, B and weight that are `needed`."""
    spec = GateSpec(top_k, score_function, biased_gates, scale)
    kernels = gate_kernels(x, A, B, weight, top_k, dtype)
    chosen = Chosen(indices, values, projections)
    asked = (needed[0], needed[1], False, *needed[2:])
    found = token_backward(
        dy, None, x, dropped, A, B, weight, balance_bias, chosen, spec, _apart(dtype), kernels, asked
    )
    return _own(found)


@token_gated_backward.register_fake
def _(dy, x, dropped, A, B, weight, *rest):
    return _like((x, dropped, A, B, weight), rest[-1])


@torch.library.custom_op("rank_experts::given_gates", mutates_args=())
def given_gates(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return y + s · (g ⊙ (x Aᵀ)) Bᵀ with gates (G, r), or None where all are 1, and the projections (N, r)."""
    return given_forward(x, None, y.contiguous(), A, B, gates, scale, _apart(dtype), given_kernels(x, A, B, dtype))


@given_gates.register_fake
def _(y, x, A, B, gates, scale, dtype):
    return y.new_empty(y.shape), x.new_empty(math.prod(x.shape[:-1]), A.shape[0], dtype=dtype)


@torch.library.custom_op("rank_experts::given_gates_backward", mutates_args=())
def given_gates_backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor | None,
    projection: Tensor,
    scale: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Return those of the gradients of x, A, B and gates that are `needed`."""
    asked = (needed[0], False, False, *needed[1:])
    kernels = given_kernels(x, A, B, dtype)
    dx, _, *rest = given_backward(dy, None, x, None, A, B, gates, projection, scale, _apart(dtype), kernels, asked)
    return _own((dx, *rest))


@given_gates_backward.register_fake
def _(dy, x, A, B, gates, projection, scale, dtype, needed):
    return _like((x, A, B, gates), needed)


def _apart(dtype: torch.dtype) -> Base:
    # The base layer is a node of its own.
    return Base(None, False, False, dtype)


def _own(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    # The results of a node may not be views of one another.
    kept: list[Tensor] = []
    for gradient in gradients:
        if gradient is not None:
            storage = gradient.untyped_storage()
            kept.append(gradient.clone() if storage.nbytes() > gradient.nbytes else gradient)
    return kept


def _like(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, asked in zip(tensors, needed) if asked and tensor is not None]


def _save_token(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, dropped, A, B, weight, balance_bias, *constants = inputs
    biased_gates = constants[2]
    # The bias moves between steps; where it is part of the gates, backward needs it as it was.
    kept = balance_bias.clone() if biased_gates else None
    ctx.save_for_backward(x, dropped, A, B, weight, kept, *output[1:])
    ctx.constants = constants
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needed)
    asked = [bool(each) for each in needed[1:6]]
    found = iter(token_gated_backward(dy, *ctx.saved_tensors, *ctx.constants, asked))
    gradients = [next(found) if each else None for each in asked]
    return (dy if needed[0] else None, *gradients, None, None, None, None, None, None)


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *tensors, scale, dtype = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.constants = (scale, dtype)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _given_gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needed)
    asked = [bool(each) for each in needed[1:5]]
    found = iter(given_gates_backward(dy, *ctx.saved_tensors, *ctx.constants, asked))
    gradients = [next(found) if each else None for each in asked]
    return (dy if needed[0] else None, *gradients, None, None)


token_gated.register_autograd(_token_gradients, setup_context=_save_token)
given_gates.register_autograd(_given_gradients, setup_context=_save_given)
