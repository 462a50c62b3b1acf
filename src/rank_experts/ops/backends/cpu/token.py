"""The token gate's op by the native kernel: of the ranks, only the chosen ones are multiplied.

The base layer and the router's product, which needs all experts, stay PyTorch's; the rest of forward is one call into
`native.cpp`, and the rest of backward another. For a few tokens without gradients one call does the router too.

But in that last case the choice is made by the keys that `gate.selection_keys` gives, so that it is the reference's in
every bit. There, scores may differ from PyTorch's in the last bit, as logits do from one matrix product to another.

Shapes as in `operands.py`.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ....routing.token import TokenGate
from ...operands import Base, Gradients, Kept, Needed, Operands
from ..gate import index_dtype, selection_keys, values_dtype
from .build import library

# Up to this many tokens without gradients, one call does everything after the base layer.
DECODE_TOKENS = 16
NARROW = torch.bfloat16
DTYPES = (torch.float32, NARROW)
# `DecodeCall` in native_decode.h: one argument costs less than sixteen.
_DECODE_CALL = struct.Struct("8qd7q")


def pays(top_k: int, num_experts: int) -> bool:
    """Say whether so few experts are active that multiplying only them is faster than dense products."""
    return 4 * top_k <= num_experts


def decode(base: Base, op: Operands) -> tuple[Tensor, Tensor] | None:
    """Apply a layer to a few tokens, without gradients, in one call after the base layer.

    What it does beside that call is what decoding a token costs most, each look-up counts: by then the base layer's
    weight has pushed everything else out of the processor's caches.

    Args:
        base: Fresh: nobody else holds its output, which is contiguous and has x's dtype.
        op: The backend serves it.

    Returns:
        y (…, d_out) and the chosen experts (N, k); None where it does not serve the case.
    """
    x, dropped, A, B, gate, scale, _ = op
    num_ranks, d_in = A.shape
    num_tokens = x.numel() // d_in
    if num_tokens > DECODE_TOKENS or not num_tokens or not isinstance(gate, TokenGate) or dropped is not None:
        return None
    if torch._C._is_any_autocast_enabled():
        return None
    weight, balance_bias, top_k, _, score_function, biased_gates = gate
    for tensor in (x, A, B, weight):
        if not tensor.is_contiguous():
            return None
    y = base.apply(x) if base.weight is None or base.transposed else torch._C._nn.linear(x, base.weight, base.bias)
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64)
    narrow = x.dtype is NARROW
    flags = (
        (score_function == "sigmoid") | biased_gates << 1 | narrow << 3 | narrow << 5
        | (A.dtype is NARROW) << 6 | (B.dtype is NARROW) << 7 | (weight.dtype is NARROW) << 8
    )  # fmt: skip
    library().rank_experts_decode(  # type: ignore[union-attr]
        _DECODE_CALL.pack(
            num_tokens, d_in, B.shape[0], num_ranks, weight.shape[0], top_k, flags, torch.get_num_threads(),
            top_k * scale, x.data_ptr(), A.data_ptr(), B.data_ptr(), weight.data_ptr(), balance_bias.data_ptr(),
            y.data_ptr(), indices.data_ptr(),
        )
    )  # fmt: skip
    return y, indices


def forward(op: Operands, gate: TokenGate, y: Tensor) -> tuple[Tensor, Kept]:
    """Add the update to y (…, d_out), which is contiguous, in place; return the chosen experts and what to keep."""
    (num_ranks, d_in), d_out, num_experts = op.A.shape, op.B.shape[0], gate.weight.shape[0]
    x, source = op.x.contiguous(), op.source.contiguous()
    A, B, weight = op.A.contiguous(), op.B.contiguous(), gate.weight.contiguous()
    num_tokens, threads = x.numel() // d_in, torch.get_num_threads()
    chosen = (num_tokens, gate.top_k)
    logits = router_logits(x.view(num_tokens, d_in), weight)
    keys = selection_keys(logits, gate)
    indices, narrow = torch.empty(chosen, dtype=torch.int64), torch.empty(chosen, dtype=index_dtype(num_experts))
    values, projections = torch.empty(chosen), torch.empty(num_tokens, gate.top_k * (num_ranks // num_experts))
    # What is kept of them in 16 bits, the kernel writes on the way.
    kept = values_dtype(op.dtype, gate)
    half = torch.empty(chosen, dtype=kept) if kept is not None and _has_halves() else None
    narrow_projections = torch.empty(projections.shape, dtype=NARROW) if op.dtype is NARROW else None
    scratch = torch.empty(tiles(d_in, d_out) * num_ranks + 2 * projections.numel() + 2 * threads * num_experts)
    if num_tokens:
        library().rank_experts_forward(  # type: ignore[union-attr]
            num_tokens, d_in, d_out, num_ranks, num_experts, gate.top_k, _flags(gate, x, source, y, A, B, weight),
            threads, gate.top_k * op.scale, source.data_ptr(), A.data_ptr(), B.data_ptr(), logits.data_ptr(),
            num_experts, keys.data_ptr(), gate.balance_bias.data_ptr(), y.data_ptr(), indices.data_ptr(),
            narrow.data_ptr(), values.data_ptr(), projections.data_ptr(), pointer(half), pointer(narrow_projections),
            scratch.data_ptr(),
        )  # fmt: skip
    if half is not None:
        values = half
    elif kept is not None:
        values = values.clamp_(min=-6e4).to(kept)
    return indices, Kept(projections if narrow_projections is None else narrow_projections, narrow, values)


def backward(op: Operands, gate: TokenGate, kept: Kept, dy: Tensor, dx: Tensor | None, needed: Needed) -> Gradients:
    """Differentiate; dy is contiguous."""
    assert kept.indices is not None
    assert kept.values is not None
    (num_ranks, d_in), d_out, num_experts = op.A.shape, op.B.shape[0], gate.weight.shape[0]
    x = op.x.contiguous().view(-1, d_in)
    dropped = None if op.dropped is None else op.dropped.contiguous().view(-1, d_in)
    A, B, weight = op.A.contiguous(), op.B.contiguous(), gate.weight.contiguous()
    num_tokens, threads = x.shape[0], torch.get_num_threads()
    into = accumulator(dx, x) if needed.x else None
    ddropped = torch.empty_like(dropped) if needed.dropped and dropped is not None else None
    # Without tokens the kernel does not run.
    make = torch.empty if num_tokens else torch.zeros
    asked = zip((A, B, weight), needed[2:])
    dA, dB, dweight = (make(each.shape, dtype=each.dtype) if wanted else None for each, wanted in asked)
    values, projections = kept.values, kept.projections
    if values.dtype == torch.float16 and not _has_halves():
        values = values.float()
    flags = _flags(gate, x, x if dropped is None else dropped, dy, A, B, weight)
    flags |= (values.dtype == torch.float16) << 9 | (projections.dtype is NARROW) << 10
    scratch = torch.empty(
        threads * (projections.numel() + 2 * (num_ranks + num_experts) * columns())
        + 4 * projections.numel()
        + 3 * values.numel()
    )
    if num_tokens:
        library().rank_experts_backward(  # type: ignore[union-attr]
            num_tokens, d_in, d_out, num_ranks, num_experts, gate.top_k, flags, threads, gate.top_k * op.scale,
            dy.data_ptr(), x.data_ptr(), pointer(dropped), A.data_ptr(), B.data_ptr(), weight.data_ptr(),
            kept.indices.data_ptr(), values.data_ptr(), projections.data_ptr(),
            pointer(gate.balance_bias), pointer(into), into is not dx, pointer(ddropped),
            pointer(dA), pointer(dB), pointer(dweight), scratch.data_ptr(),
        )  # fmt: skip
    return Gradients(joined(dx, into), ddropped, dA, dB, dweight)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W_gᵀ (N, E) in float32, for contiguous x (N, d_in) and W_g (E, d_in).

    Products of bfloat16 numbers are exact in float32, so that a unit that multiplies the one and adds in the other is
    as good as casting first.
    """
    (num_tokens, d_in), num_experts = x.shape, weight.shape[0]
    if x.dtype == weight.dtype == NARROW and num_tokens:
        logits, packed = torch.empty(num_tokens, num_experts), torch.empty(-(-num_experts // 32) * 16 * d_in)
        native = library()
        assert native is not None
        if native.rank_experts_logits(
            num_tokens, d_in, num_experts, torch.get_num_threads(), x.data_ptr(), weight.data_ptr(),
            packed.data_ptr(), logits.data_ptr(),
        ):  # fmt: skip
            return logits
    return x.float() @ weight.float().t()


def count(y: Tensor, indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor | None:
    """Count as `load_of_output`; None where the kernel does not serve."""
    num_tokens, top_k = indices.shape
    if y.dtype not in DTYPES or not pays(top_k, num_experts) or library() is None:
        return None
    if not (y.is_contiguous() and indices.is_contiguous() and (mask is None or mask.is_contiguous())):
        return None
    load = torch.zeros(num_experts)
    library().rank_experts_count(  # type: ignore[union-attr]
        num_tokens, y.shape[-1], top_k, y.dtype is NARROW, indices.data_ptr(), y.data_ptr(), pointer(mask),
        load.data_ptr(),
    )  # fmt: skip
    return load


@functools.cache
def columns() -> int:
    """Return how many numbers a tile of the kernel's has."""
    return library().rank_experts_columns()  # type: ignore[union-attr]


@functools.cache
def _has_halves() -> bool:
    return bool(library().rank_experts_halves())  # type: ignore[union-attr]


def tiles(*widths: int) -> int:
    """Return how many numbers the tiles of a row of each width have together."""
    return sum(-(-width // columns()) * columns() for width in widths)


def accumulator(dx: Tensor | None, x: Tensor) -> Tensor:
    """Return dx (N, d_in) where the kernel can add x's gradient to it, else a new tensor for that gradient alone."""
    return dx if dx is not None and dx.is_contiguous() and dx.dtype == x.dtype else torch.empty_like(x)


def joined(dx: Tensor | None, into: Tensor | None) -> Tensor | None:
    """Return the base layer's share dx together with what the kernel wrote `into` its `accumulator`."""
    return dx.add_(into) if dx is not None and into is not None and into is not dx else into


def pointer(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers lie; None for none."""
    return None if tensor is None else tensor.data_ptr()


def _flags(gate: TokenGate, *tensors: Tensor) -> int:
    # As `Call` in native_tiles.h has them; the tensors: x, what A reads, y or dy, A, B, W_g.
    flags = (gate.score_function == "sigmoid") | gate.biased_gates << 1 | (len(tensors[-1]) <= 256) << 2
    for bit, tensor in enumerate(tensors, 3):
        if tensor.dtype == NARROW:
            flags |= 1 << bit
    return flags
