"""The token gate's op by the native CPU kernel: of the ranks, only the chosen ones are multiplied.

The base layer and the router's product, which needs all experts, stay PyTorch's; the rest of forward is one call into
`native.cpp`, and the rest of backward another. For a few tokens without gradients one call does the router too.
float32 and bfloat16 tensors in any mix; arithmetic in float32.

But in that last case the choice is made by the keys that `gate.selection_keys` gives, so that it is the reference's in
every bit. There, scores may differ from PyTorch's in the last bit, as logits do from one matrix product to another.

Shapes as in `products.py`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .gate import Chosen, GateSpec, selection_keys, values_dtype
from .native_build import library

if TYPE_CHECKING:
    from ..routing import TokenRouter
    from .products import Base

# Up to this many tokens without gradients, one call does everything after the base layer.
DECODE_TOKENS = 16
NARROW = torch.bfloat16
DTYPES = (torch.float32, NARROW)
PLAIN = frozenset({Tensor, nn.Parameter})
"""The types of tensors that are what they seem."""
# `DecodeCall` in native.cpp: one argument costs less than sixteen.
_DECODE_CALL = struct.Struct("8qd7q")


def supports(tensors: Sequence[Tensor], dtype: torch.dtype, top_k: int, num_experts: int) -> bool:
    """Say whether the kernel is there, takes these tensors, and is expected to beat dense products.

    Args:
        tensors: The op's input and parameters.
        dtype: What the adapter computes in.
        top_k: k.
        num_experts: E.
    """
    if dtype not in DTYPES or not pays(top_k, num_experts):
        return False
    for tensor in tensors:  # Not by all(), whose generator costs a token's decoding a microsecond.
        if not tensor.is_cpu or tensor.dtype not in DTYPES:
            return False
    return library() is not None


def pays(top_k: int, num_experts: int) -> bool:
    """Say whether so few experts are active that multiplying only them is faster than dense products."""
    return 4 * top_k <= num_experts


def decode(
    base_layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, router: TokenRouter, scale: float, want_indices: bool = True
) -> tuple[Tensor, Tensor | None] | None:
    """Apply a layer to a few tokens, without gradients, in one call after the base layer.

    What it does beside that call is what decoding a token costs most: each look-up counts.

    Args:
        base_layer: Plain, so that nobody else holds its output, which is contiguous and has x's dtype.
        x: (…, d_in).
        A: (r, d_in).
        B: (d_out, r).
        router: The gate.
        scale: s.
        want_indices: Return the choice.

    Returns:
        y (…, d_out) and the chosen experts (N, k) or None; None where it does not serve the case.
    """
    (num_ranks, d_in), top_k = A.shape, router.top_k
    num_tokens = x.numel() // d_in
    if num_tokens > DECODE_TOKENS or not num_tokens:
        return None
    weight = router.weight
    num_experts = weight.shape[0]
    if not supports((x, A, B, weight), A.dtype, top_k, num_experts):
        return None
    for tensor in (x, A, B, weight):
        if type(tensor) not in PLAIN or not tensor.is_contiguous():
            return None
    # Not by a call of the module, which would look again for the hooks that a plain layer does not have.
    y = base_layer.forward(x)
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64) if want_indices else None
    narrow = x.dtype is NARROW
    flags = (
        (router.score_function == "sigmoid") | router.biased_gates << 1 | narrow << 3 | narrow << 5
        | (A.dtype is NARROW) << 6 | (B.dtype is NARROW) << 7 | (weight.dtype is NARROW) << 8
    )  # fmt: skip
    library().rank_experts_decode(  # type: ignore[union-attr]
        _DECODE_CALL.pack(
            num_tokens, d_in, B.shape[0], num_ranks, num_experts, top_k, flags, torch.get_num_threads(), top_k * scale,
            x.data_ptr(), A.data_ptr(), B.data_ptr(), weight.data_ptr(), router.balance_bias.data_ptr(), y.data_ptr(),
            indices.data_ptr() if indices is not None else 0,
        )
    )  # fmt: skip
    return y, indices


def token_forward(
    x: Tensor,
    dropped: Tensor | None,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    spec: GateSpec,
    base: Base,
) -> tuple[Tensor, Tensor, Chosen]:
    """Add the update to the base layer's output y; else as `products.token_forward`."""
    dtype = y.dtype
    y = y if dtype in DTYPES else y.float()
    if not (base.in_place and y.is_contiguous()):
        y = y.clone(memory_format=torch.contiguous_format)
    num_ranks, d_in = A.shape
    x = x.contiguous()
    source = x if dropped is None else dropped.contiguous()
    A, B, weight = A.contiguous(), B.contiguous(), weight.contiguous()
    num_tokens, num_experts, d_out = x.numel() // d_in, weight.shape[0], B.shape[0]
    indices = torch.empty(num_tokens, spec.top_k, dtype=torch.int64)
    flags = _flags(spec, num_experts, x, source, y, A, B, weight)
    sizes = (num_tokens, d_in, d_out, num_ranks, num_experts, spec.top_k, flags, torch.get_num_threads())
    logits = router_logits(x.view(num_tokens, d_in), weight)
    keys = selection_keys(logits, balance_bias, spec)
    narrow = torch.empty(num_tokens, spec.top_k, dtype=_index_dtype(num_experts))
    values = torch.empty(num_tokens, spec.top_k)
    projections = torch.empty(num_tokens, spec.top_k * (num_ranks // num_experts))
    # What is kept of them in 16 bits, the kernel writes on the way.
    half = torch.float16 if _has_halves() and values_dtype(base.dtype, spec) is not None else None
    half_values = None if half is None else torch.empty(values.shape, dtype=half)
    narrow_projections = torch.empty(projections.shape, dtype=NARROW) if base.dtype is NARROW else None
    native = library()
    assert native is not None
    width = columns()
    tiles = -(-d_in // width) - (-d_out // width)
    scratch = torch.empty(tiles * num_ranks * width + 2 * projections.numel() + 2 * sizes[-1] * num_experts)
    if num_tokens:
        native.rank_experts_forward(
            *sizes, spec.top_k * spec.scale, source.data_ptr(), A.data_ptr(), B.data_ptr(), logits.data_ptr(),
            num_experts, keys.data_ptr(), balance_bias.data_ptr(), y.data_ptr(), indices.data_ptr(), narrow.data_ptr(),
            values.data_ptr(), projections.data_ptr(), pointer(half_values), pointer(narrow_projections),
            scratch.data_ptr(),
        )  # fmt: skip
    if half_values is not None:
        values = half_values
    elif (kept := values_dtype(base.dtype, spec)) is not None:
        values = values.clamp_(min=-6e4).to(kept)
    chosen = Chosen(narrow, values, projections if narrow_projections is None else narrow_projections)
    return y.to(dtype), indices, chosen


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


def token_backward(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    dropped: Tensor | None,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor | None,
    chosen: Chosen,
    spec: GateSpec,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Add x's gradient to dx (N, d_in), the base layer's share, or make it; else as `products.token_backward`."""
    num_ranks, d_in = A.shape
    flat = x.contiguous().view(-1, d_in)
    source = flat if dropped is None else dropped.contiguous().view(-1, d_in)
    A, B, weight = A.contiguous(), B.contiguous(), weight.contiguous()
    dy = (dy if dy.dtype in DTYPES else dy.float()).contiguous()
    num_tokens, num_experts, d_out = flat.shape[0], weight.shape[0], B.shape[0]
    dx_base = dx
    if needed[0]:
        fits = dx is not None and dx.is_contiguous() and dx.dtype == flat.dtype
        dx = dx if fits else torch.empty_like(flat)
    ddropped = torch.empty_like(source) if needed[1] else None
    # Without tokens the kernel does not run.
    make = torch.empty if num_tokens else torch.zeros
    matrices = zip((A, B, weight), needed[3:6])
    dA, dB, dweight = (make(each.shape, dtype=each.dtype) if wanted else None for each, wanted in matrices)
    values, projections = chosen.values, chosen.projections
    if values.dtype == torch.float16 and not _has_halves():
        values = values.float()
    flags = _flags(spec, num_experts, flat, source, dy, A, B, weight)
    flags |= (values.dtype == torch.float16) << 9 | (projections.dtype is NARROW) << 10
    threads = torch.get_num_threads()
    native = library()
    assert native is not None
    width = columns()
    scratch = torch.empty(
        threads * (projections.numel() + 2 * (num_ranks + num_experts) * width)
        + 4 * projections.numel()
        + 3 * values.numel()
    )
    if num_tokens:
        native.rank_experts_backward(
            num_tokens, d_in, d_out, num_ranks, num_experts, spec.top_k, flags, threads, spec.top_k * spec.scale,
            dy.data_ptr(), flat.data_ptr(), None if dropped is None else source.data_ptr(), A.data_ptr(),
            B.data_ptr(), weight.data_ptr(), chosen.indices.data_ptr(), values.data_ptr(), projections.data_ptr(),
            pointer(balance_bias), pointer(dx if needed[0] else None), dx is not dx_base, pointer(ddropped),
            pointer(dA), pointer(dB), pointer(dweight), scratch.data_ptr(),
        )  # fmt: skip
    if dx is not None and dx is not dx_base and dx_base is not None:
        dx = dx_base.add_(dx)
    return (
        dx.view(x.shape) if needed[0] and dx is not None else None,
        ddropped.view(dropped.shape) if ddropped is not None and dropped is not None else None,
        dA,
        dB,
        dweight,
    )


def count_load(y: Tensor, indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor | None:
    """Count as `dispatch.load_of_output`; None where the kernel does not serve."""
    num_tokens, top_k = indices.shape
    if type(y) not in PLAIN or not supports((y,), y.dtype, top_k, num_experts):
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


def _flags(spec: GateSpec, num_experts: int, *tensors: Tensor) -> int:
    # As `Call` in native.cpp has them; the tensors: x, what A reads, y or dy, A, B, W_g.
    flags = (spec.score_function == "sigmoid") | spec.biased_gates << 1 | (num_experts <= 256) << 2
    for bit, tensor in enumerate(tensors, 3):
        if tensor.dtype == NARROW:
            flags |= 1 << bit
    return flags


def _index_dtype(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int32


def pointer(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers lie; None for none."""
    return None if tensor is None else tensor.data_ptr()
