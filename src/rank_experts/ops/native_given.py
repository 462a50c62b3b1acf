"""The op with given gates, and MoRE's gate, by the native CPU kernel: for few ranks, all of which a token uses.

Forward is one call after the base layer, backward another, and MoRE's gate one each, where PyTorch has some sixty
launches for a few dozen numbers. float32 and bfloat16 tensors in any mix; arithmetic in float32.

Shapes as in `products.py`; T tasks, e numbers in a task's embedding, G rows of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .native import DTYPES, NARROW, columns, pointer
from .native_build import library

if TYPE_CHECKING:
    from .products import Base

# Up to this many ranks the kernel is expected to beat dense products; also in native_given.h.
FEW_RANKS = 16
_SCALINGS = {"none": 0, "task": 1, "rank": 2}
TaskGate = tuple[Tensor, Tensor, Tensor]
"""A task gate's embedding, weight and bias."""


def supports(tensors: Sequence[Tensor], dtype: torch.dtype, num_ranks: int) -> bool:
    """Say whether the kernel is there and takes these tensors and so many ranks with given gates."""
    if dtype not in DTYPES or num_ranks > FEW_RANKS:
        return False
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype not in DTYPES:
            return False
    return library() is not None


def forward(
    x: Tensor,
    dropped: Tensor | None,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor | None,
    num_ranks: int,
    scale: float,
    base: Base,
) -> tuple[Tensor, Tensor]:
    """Add the update of the first `num_ranks` ranks to the base layer's output y.

    Returns:
        y, and the projections (N, num_ranks).

    Raises:
        ValueError: The gates are not (G, r) with N a multiple of G.
    """
    dtype = y.dtype
    y = y if dtype in DTYPES else y.float()
    if not (base.in_place and y.is_contiguous()):
        y = y.clone(memory_format=torch.contiguous_format)
    source = (x if dropped is None else dropped).contiguous()
    A, B = A.contiguous(), B.contiguous()
    gates = None if gates is None else gates.float().contiguous()
    num_tokens, d_in, d_out = source.numel() // A.shape[1], A.shape[1], B.shape[0]
    if (
        gates is not None
        and num_tokens
        and (gates.shape[1:] != A.shape[:1] or not len(gates) or num_tokens % len(gates))
    ):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)} for {num_tokens} tokens and {len(A)} ranks: "
            f"expected (G, {len(A)}), a row for as many tokens each."
        )
    projections = torch.empty(num_tokens, num_ranks)
    native = library()
    assert native is not None
    scratch = torch.empty(_tiles(d_in, d_out) * num_ranks)
    if num_tokens:
        native.rank_experts_given_forward(
            num_tokens, d_in, d_out, len(A), num_ranks, 0, _flags(source, y, A, B), torch.get_num_threads(),
            scale, source.data_ptr(), A.data_ptr(), B.data_ptr(), pointer(gates),
            1 if gates is None else len(gates), y.data_ptr(), projections.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
    return y.to(dtype), projections.to(base.dtype)


def backward(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    gates: Tensor | None,
    projections: Tensor,
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Add x's gradient to dx (N, d_in), the base layer's share, or make it.

    Returns:
        The gradients of x, dropped, A, B and gates; `needed` says of x, dropped, tensor, A, B, gates which.
    """
    own = x if dropped is None else dropped
    assert own is not None
    num_ranks, d_in = projections.shape[1], A.shape[1]
    source = own.contiguous().view(-1, d_in)
    A, B = A.contiguous(), B.contiguous()
    dy = (dy if dy.dtype in DTYPES else dy.float()).contiguous()
    num_tokens, d_out = len(source), B.shape[0]
    target = dx if dropped is None else None
    dx_base = target
    if needed[0 if dropped is None else 1]:
        fits = target is not None and target.is_contiguous() and target.dtype == source.dtype
        target = target if fits else torch.empty_like(source)
    make = torch.empty if num_tokens else torch.zeros
    dA = make(A.shape, dtype=A.dtype) if needed[3] else None
    dB = make(B.shape, dtype=B.dtype) if needed[4] else None
    given = None if gates is None else gates.float().contiguous()
    dgates = make(given.shape) if given is not None and needed[5] else None
    threads = torch.get_num_threads()
    native = library()
    assert native is not None
    projections = projections.float()
    scratch = torch.empty(_tiles(d_in, d_out) * num_ranks * (1 + threads) + projections.numel())
    if num_tokens:
        native.rank_experts_given_backward(
            num_tokens, d_in, d_out, len(A), num_ranks, 0, _flags(source, dy, A, B), threads, scale,
            dy.data_ptr(), source.data_ptr(), A.data_ptr(), B.data_ptr(), pointer(given),
            1 if given is None else len(given), projections.data_ptr(), pointer(target), target is not dx_base,
            pointer(dA), pointer(dB), pointer(dgates), scratch.data_ptr(),
        )  # fmt: skip
    dgates = dgates if dgates is None or gates is None else dgates.to(gates.dtype)
    if dropped is not None:
        return dx, None if target is None else target.view(dropped.shape), dA, dB, dgates
    if target is not None and target is not dx_base and dx_base is not None:
        target = dx_base.add_(target)
    return None if target is None else target.view(own.shape), None, dA, dB, dgates


def task_gates(gate: TaskGate, task_ids: Tensor, rank_scaling: str) -> tuple[Tensor, int, Tensor, Tensor]:
    """Choose as `routing.TaskRouter`, up to the rounding of another sum.

    Args:
        gate: Embedding (T, e), weight (r, e) and bias (r), of one dtype.
        task_ids: (G,) int64.
        rank_scaling: "none", "task" or "rank".

    Returns:
        Gates (G, r), how many ranks are used at most, probabilities (G, r), and the chosen ranks less one (G,) int64.

    Raises:
        IndexError: A task does not exist.
    """
    embedding, weight, bias = (each.contiguous() for each in gate)
    task_ids, (num_tasks, dim), num_ranks = task_ids.contiguous(), embedding.shape, weight.shape[0]
    gates, probabilities = torch.empty(2, len(task_ids), num_ranks).unbind()
    best = torch.empty(len(task_ids), dtype=torch.int64)
    used = library().rank_experts_task_gates(  # type: ignore[union-attr]
        len(task_ids), num_ranks, num_tasks, _SCALINGS[rank_scaling], dim, embedding.dtype is NARROW,
        task_ids.data_ptr(), embedding.data_ptr(), weight.data_ptr(), bias.data_ptr(), probabilities.data_ptr(),
        best.data_ptr(), gates.data_ptr(),
    )  # fmt: skip
    if used < 0:
        raise IndexError(f"task_ids contain {task_ids.tolist()}: expected 0…{num_tasks - 1}.")
    return gates, used, probabilities, best


def task_gates_backward(
    dgates: Tensor,
    num_used: int,
    probabilities: Tensor,
    best: Tensor,
    gate: TaskGate,
    task_ids: Tensor,
    rank_scaling: str,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of embedding (T, e), weight (r, e) and bias (r); `needed` says which.

    Args:
        dgates: (G, r), of which the first `num_used` columns are read.
        num_used: How many ranks were used at most.
        probabilities: From `task_gates`, as is `best`.
        best: The chosen ranks less one.
        gate: What `task_gates` had, and so on.
        task_ids: (G,) int64.
        rank_scaling: "none", "task" or "rank".
        needed: Of embedding, weight and bias.
    """
    embedding, weight, bias = (each.contiguous() for each in gate)
    task_ids, (num_tasks, dim) = task_ids.contiguous(), embedding.shape
    made = [torch.empty(each.shape, dtype=each.dtype) if wanted else None for each, wanted in zip(gate, needed)]
    library().rank_experts_task_gates_backward(  # type: ignore[union-attr]
        len(best), len(bias), num_tasks, _SCALINGS[rank_scaling], dim, embedding.dtype is NARROW, num_used,
        task_ids.data_ptr(), embedding.data_ptr(), weight.data_ptr(), dgates.data_ptr(), probabilities.data_ptr(),
        best.data_ptr(), *(pointer(each) for each in made),
    )  # fmt: skip
    return tuple(made)


def _tiles(*widths: int) -> int:
    # Numbers in the tiles of a row of each.
    width_of_tile = columns()
    return sum(-(-width // width_of_tile) * width_of_tile for width in widths)


def _flags(source: Tensor, y: Tensor, A: Tensor, B: Tensor) -> int:
    return sum(bit for bit, tensor in ((16, source), (32, y), (64, A), (128, B)) if tensor.dtype == NARROW)
