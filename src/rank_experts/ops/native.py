"""The token gate's op with the native CPU kernel: only the chosen ranks are multiplied.

The router's product needs all experts and stays PyTorch's; so does the base layer. The rest of forward is one call
into `native.cpp`, and the rest of backward another. float32 and bfloat16 tensors, in any mix; arithmetic in float32.
The choice is made by the keys that `gate.selection_keys` gives, so that it is the reference's in every bit.

Shapes as in `fused.py`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .fused import Base, _base_backward, _differentiable, _like, _no_autocast, _save, _token_update
from .gate import Chosen, GateSpec, selection_keys, values_dtype
from .native_build import library

# Up to this many tokens without gradients, one call does it all, the router's product too.
DECODE_TOKENS = 16
_DTYPES = (torch.float32, torch.bfloat16)


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "d_in", "d_out", "num_ranks", "num_experts", "top_k")),
        *((name, ctypes.c_int64) for name in ("sigmoid", "biased", "threads")),
        ("factor", ctypes.c_double),
    )


class _Activation(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("is_bfloat16", ctypes.c_int64))


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "row_stride", "column_stride", "is_bfloat16")),
    )


class _Side(ctypes.Structure):
    _fields_ = (
        ("src", _Activation),
        ("dst", _Activation),
        ("fresh", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("matrices", _Matrix * 2),
        ("gradients", ctypes.c_void_p * 2),
        ("num_matrices", ctypes.c_int64),
    )


def supports(x: Tensor, tensor: Tensor, A: Tensor, B: Tensor, weight: Tensor, spec: GateSpec) -> bool:
    """Say whether the kernel is there, takes these tensors, and is expected to be faster than dense products."""
    tensors = (x, tensor, A, B, weight)
    return (
        all(t.device.type == "cpu" and t.dtype in _DTYPES for t in tensors)
        and 4 * spec.top_k <= len(weight)
        and library() is not None
    )


def token_gated(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    spec: GateSpec,
    base: Base,
) -> tuple[Tensor, Tensor]:
    """Compute what `fused.token_gated` computes, for tensors that `supports` takes."""
    inputs = (x, dropped, tensor, A, B, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return NativeTokenGated.apply(*inputs, balance_bias, spec, base)
    if dropped is None and x.numel() <= DECODE_TOKENS * x.shape[-1] and all(
        t.is_contiguous() for t in (x, A, B, weight)
    ):
        return _decode(x, tensor, A, B, weight, balance_bias, spec, base)
    y, indices, _ = _forward(*inputs, balance_bias, spec, base)
    return y, indices


class NativeTokenGated(torch.autograd.Function):
    """`token_gated` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x, dropped, tensor, A, B, weight, balance_bias, spec, base):
        """Compute y and the chosen experts, and save x and `Chosen`."""
        y, indices, chosen = _forward(x, dropped, tensor, A, B, weight, balance_bias, spec, base)
        kept = balance_bias.clone() if spec.biased_gates else None
        _save(ctx, base, tensor, y, x, dropped, A, B, weight, kept, *chosen)
        ctx.spec, ctx.base = spec, base
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return y, indices

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, dropped, tensor, A, B and weight."""
        if dy is None:
            return (None,) * 9
        base_weight, x, dropped, A, B, weight, balance_bias, *saved = ctx.saved_tensors
        chosen, spec, base, needed = Chosen(*saved), ctx.spec, ctx.base, ctx.needs_input_grad
        if torch.is_grad_enabled():
            update = _token_update(x, dropped, A, B, weight, balance_bias, chosen, spec, base)
            inputs = (x, dropped, A, B, weight)
            return (*_differentiable(update, dy, base_weight, inputs, needed, base), *(None,) * 3)
        with _no_autocast(x):
            flat = dy.reshape(-1, dy.shape[-1])
            dx = _base_backward(flat, base_weight, base) if needed[0] else None
            return (
                *_backward(dx, flat, x, dropped, A, B, weight, balance_bias, chosen, spec, needed),
                None,
                None,
                None,
            )


def _forward(
    x: Tensor,
    dropped: Tensor | None,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    spec: GateSpec,
    base: Base,
) -> tuple[Tensor, Tensor, Chosen]:
    native = library()
    assert native is not None
    y = tensor if base.layer is None else base.layer(x)
    if not (base.in_place and y.is_contiguous()):
        y = y.clone(memory_format=torch.contiguous_format)
    with _no_autocast(x):
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        source = flat if dropped is None else dropped.reshape(flat.shape).contiguous()
        logits = flat.float() @ weight.float().t()
        keys = selection_keys(logits, balance_bias, spec)
        (num_tokens, d_in), d_out, num_experts = flat.shape, len(B), len(weight)
        indices = torch.empty(num_tokens, spec.top_k, dtype=torch.int64)
        narrow = torch.empty(num_tokens, spec.top_k, dtype=torch.uint8 if num_experts <= 256 else torch.int32)
        values = torch.empty(num_tokens, spec.top_k)
        projections = torch.empty(num_tokens, spec.top_k * (len(A) // num_experts))
        sizes = _sizes(num_tokens, d_in, d_out, len(A), num_experts, spec)
        columns = native.rank_experts_columns()
        padded = -(-d_in // columns) + -(-d_out // columns)
        scratch = torch.empty(
            padded * len(A) * columns + projections.numel() * 2 + sizes.threads * num_experts * 2, dtype=torch.float32
        )
        if num_tokens:
            native.rank_experts_forward(
                ctypes.byref(sizes), ctypes.byref(_activation(source)), ctypes.byref(_matrix(A)), ctypes.byref(_matrix(B.t())),
                _pointer(logits), ctypes.c_int64(logits.stride(0)), _pointer(keys), _pointer(balance_bias),
                ctypes.byref(_activation(y)), _pointer(indices), _pointer(narrow), ctypes.c_int64(narrow.dtype == torch.uint8),
                _pointer(values), _pointer(projections), _pointer(scratch),
            )  # fmt: skip
        narrower = values_dtype(base.dtype, spec)
        if narrower is not None:
            values = values.clamp_(min=-6e4).to(narrower)
        return y, indices, Chosen(narrow, values, projections.to(base.dtype))


def _decode(
    x: Tensor,
    tensor: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    balance_bias: Tensor,
    spec: GateSpec,
    base: Base,
) -> tuple[Tensor, Tensor]:
    native = library()
    assert native is not None
    y = tensor if base.layer is None else base.layer(x)
    if not (base.in_place and y.is_contiguous()):
        y = y.clone(memory_format=torch.contiguous_format)
    num_ranks, d_in = A.shape
    num_tokens, num_experts, narrow = x.numel() // d_in, weight.shape[0], torch.bfloat16
    indices = torch.empty(num_tokens, spec.top_k, dtype=torch.int64)
    flags = (
        (spec.score_function == "sigmoid") | spec.biased_gates << 1 | (x.dtype == narrow) << 2 | (y.dtype == narrow) << 3
        | (A.dtype == narrow) << 4 | (B.dtype == narrow) << 5 | (weight.dtype == narrow) << 6
    )  # fmt: skip
    native.rank_experts_decode(
        num_tokens, d_in, B.shape[0], num_ranks, num_experts, spec.top_k, spec.top_k * spec.scale, flags,
        torch.get_num_threads(), x.data_ptr(), A.data_ptr(), B.data_ptr(), weight.data_ptr(), balance_bias.data_ptr(),
        y.data_ptr(), indices.data_ptr(),
    )  # fmt: skip
    return y, indices


def _backward(
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
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    # dx, ddropped, dtensor, dA, dB and dweight; dx is the base layer's share, ours to overwrite, or None.
    native = library()
    assert native is not None
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    source = flat if dropped is None else dropped.reshape(flat.shape).contiguous()
    narrow_dy = dy if dy.dtype in _DTYPES else dy.float()
    narrow_dy = narrow_dy.contiguous()
    values, projections = chosen.values.float(), chosen.projections.float()
    (num_tokens, d_in), d_out, num_experts = flat.shape, len(B), len(weight)
    fresh = dx is None
    if needed[0] and dx is None:
        dx = torch.empty_like(flat)
    ddropped = torch.empty_like(source) if needed[1] else None
    dA = torch.zeros(A.shape) if needed[3] else None
    dB = torch.zeros(B.shape) if needed[4] else None
    dweight = torch.zeros(weight.shape) if needed[5] else None
    sizes = _sizes(num_tokens, d_in, d_out, len(A), num_experts, spec)
    columns = native.rank_experts_columns()
    scratch = torch.empty(
        sizes.threads * (projections.numel() + 2 * (len(A) + num_experts) * columns)
        + projections.numel() * 3
        + values.numel() * 2
    )
    if dropped is None:
        sides = (_Side * 1)(_side(flat, dx, fresh, (A, weight), (dA, dweight)))
    else:
        sides = (_Side * 2)(
            _side(source, ddropped, True, (A,), (dA,)), _side(flat, dx, fresh, (weight,), (dweight,))
        )
    if num_tokens:
        native.rank_experts_backward(
            ctypes.byref(sizes), ctypes.byref(_activation(narrow_dy)), ctypes.byref(_matrix(B.t())), _pointer(chosen.indices),
            ctypes.c_int64(chosen.indices.dtype == torch.uint8), _pointer(values), _pointer(projections),
            _pointer(balance_bias), _pointer(dB), sides, ctypes.c_int64(len(sides)), _pointer(scratch),
        )  # fmt: skip
    return (
        None if dx is None else dx.view(x.shape),
        None if ddropped is None or dropped is None else ddropped.view(dropped.shape),
        dy.view(dy.shape) if needed[2] else None,
        None if dA is None else dA.to(A.dtype),
        None if dB is None else dB.to(B.dtype),
        None if dweight is None else dweight.to(weight.dtype),
    )


def _sizes(num_tokens: int, d_in: int, d_out: int, num_ranks: int, num_experts: int, spec: GateSpec) -> _Sizes:
    return _Sizes(
        num_tokens, d_in, d_out, num_ranks, num_experts, spec.top_k,
        spec.score_function == "sigmoid", spec.biased_gates, torch.get_num_threads(), spec.top_k * spec.scale,
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _activation(tensor: Tensor | None) -> _Activation:
    if tensor is None:
        return _Activation(None, 0)
    return _Activation(tensor.data_ptr(), tensor.dtype == torch.bfloat16)


def _matrix(tensor: Tensor) -> _Matrix:
    return _Matrix(tensor.data_ptr(), len(tensor), *tensor.stride(), tensor.dtype == torch.bfloat16)


def _side(
    src: Tensor,
    dst: Tensor | None,
    fresh: bool,
    matrices: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> _Side:
    return _Side(
        _activation(src),
        _activation(dst),
        fresh,
        src.shape[1],
        (_Matrix * 2)(*(_matrix(matrix) for matrix in matrices)),
        (ctypes.c_void_p * 2)(*(None if gradient is None else gradient.data_ptr() for gradient in gradients)),
        len(matrices),
    )
