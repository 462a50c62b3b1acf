"""The token gate between the two products as Triton kernels, with the signatures of `backends/gate.py`.

One launch each: select, weigh, save compactly and spread u; the gate's derivative; the load's counts; and for a few
tokens without gradients, everything after x · [A; W_g]ᵀ. The products themselves stay with cuBLAS. A kernel holds a
token's experts in one tile, ranks along its second axis: an expert's ρ ranks carry the same key, so that they are
chosen together.

The choice is the maximum of int64 keys that hold the score's bits above the expert's number, k times; the lowest
index wins ties and a NaN is the largest, as in `gate.select`. float32, bfloat16 and float16; r ≤ 256.

With TRITON_INTERPRET=1 the kernels run on the CPU, which is how the tests run them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....routing.token import SMALLEST_KEY, TokenGate
from ...operands import Kept
from ..gate import divides, selection_keys, values_dtype

# Above every key of a chosen place lies every key that is valid; see `_packed`.
_MASKED = tl.constexpr(-(1 << 62))
_TAKEN = tl.constexpr(-(1 << 62) - 1)
_SMALLEST = tl.constexpr(SMALLEST_KEY)


@triton.jit
def _packed(keys, experts, valid):
    # (…) int64 that order as (key, −expert) do; masked places come last.
    bits = tl.where(keys == 0.0, 0.0, keys).to(tl.int32, bitcast=True)
    bits = tl.where(keys != keys, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    packed = bits.to(tl.int64) * 256 + (255 - experts)
    return tl.where(valid, packed, _MASKED)


@triton.jit
def _values(z, bias, SIGMOID: tl.constexpr, BIASED: tl.constexpr):
    # What gates are computed from: keys where they are divided by their sum, else log-scores.
    if SIGMOID:
        if BIASED:
            value = 1.0 / (1.0 + tl.exp(-z)) + bias
            return tl.where(value < _SMALLEST, _SMALLEST, value)
        return tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))
    if BIASED:
        return z + bias
    return z


@triton.jit
def _weights(values, chosen, multiplicity, DIVIDES: tl.constexpr):
    # Weights along axis 1 that add up to 1, each of them `multiplicity` times.
    if DIVIDES:
        raised = tl.where(chosen, values, 0.0)
    else:
        top = tl.max(tl.where(chosen, values, float("-inf")), 1)
        raised = tl.where(chosen, tl.exp(values - top[:, None]), 0.0)
    return raised * multiplicity / tl.sum(raised, 1)[:, None]


@triton.jit
def _gated(p, gates):
    # p · g in float32, of a gate that has p's precision.
    return p.to(tl.float32) * gates.to(p.dtype).to(tl.float32)


@triton.jit
def _forward_kernel(
    z_ptr, keys_ptr, p_ptr, b_ptr, u_ptr, indices_ptr, narrow_ptr, values_ptr, kept_ptr,
    num_tokens, num_ranks, z_stride, p_stride, factor,
    K: tl.constexpr, RHO: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, HALF: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    row_ok = rows < num_tokens
    ok = row_ok[:, None] & (ranks < num_ranks)[None, :]
    z = tl.load(z_ptr + rows[:, None] * z_stride + (ranks // RHO)[None, :], mask=ok, other=0.0)
    bias = tl.load(b_ptr + ranks // RHO, mask=ranks < num_ranks, other=0.0)[None, :]
    keys = tl.load(keys_ptr + rows[:, None] * (num_ranks // RHO) + (ranks // RHO)[None, :], mask=ok, other=0.0)
    packed = _packed(keys, (ranks // RHO)[None, :], ok)
    chosen = packed == _TAKEN
    for j in range(K):
        best = tl.max(packed, 1)
        hit = packed == best[:, None]
        chosen = chosen | hit
        packed = tl.where(hit, _TAKEN, packed)
        expert = 255 - (best & 255)
        z_j = tl.load(z_ptr + rows * z_stride + expert, mask=row_ok, other=0.0)
        b_j = tl.load(b_ptr + expert, mask=row_ok, other=0.0)
        value = _values(z_j, b_j, SIGMOID, BIASED)
        if HALF:
            value = tl.where(value < -6e4, -6e4, value)
        tl.store(indices_ptr + rows * K + j, expert, mask=row_ok)
        tl.store(narrow_ptr + rows * K + j, expert.to(tl.uint8), mask=row_ok)
        tl.store(values_ptr + rows * K + j, value.to(values_ptr.dtype.element_ty), mask=row_ok)
        for q in range(RHO):
            kept = tl.load(p_ptr + rows * p_stride + expert * RHO + q, mask=row_ok, other=0.0)
            tl.store(kept_ptr + (rows * K + j) * RHO + q, kept, mask=row_ok)
    gates = _weights(_values(z, bias, SIGMOID, BIASED), chosen, RHO, SIGMOID and BIASED) * factor
    p = tl.load(p_ptr + rows[:, None] * p_stride + ranks[None, :], mask=ok, other=0.0)
    u = tl.where(chosen, _gated(p, gates), 0.0)
    tl.store(u_ptr + rows[:, None] * num_ranks + ranks[None, :], u.to(u_ptr.dtype.element_ty), mask=ok)


def forward(logits: Tensor, projection: Tensor, gate: TokenGate, scale: float) -> tuple[Tensor, Tensor, Kept]:
    """Gate the projections; see `gate.forward`."""
    num_tokens, num_ranks = projection.shape
    num_experts = logits.shape[1]
    # PyTorch's own sigmoid, whose last bit may decide a choice.
    keys = selection_keys(logits, gate)
    halves = values_dtype(projection.dtype, gate) == torch.float16
    u = torch.empty(num_tokens, num_ranks, dtype=projection.dtype, device=projection.device)
    indices = u.new_empty(num_tokens, gate.top_k, dtype=torch.int64)
    narrow = torch.empty_like(indices, dtype=torch.uint8)
    values = torch.empty_like(indices, dtype=torch.float16 if halves else torch.float32)
    kept = u.new_empty(num_tokens, gate.top_k * (num_ranks // num_experts))
    block_r = triton.next_power_of_2(num_ranks)
    block_n = max(1, 2048 // block_r)
    if num_tokens:
        _forward_kernel[(triton.cdiv(num_tokens, block_n),)](
            logits, keys, projection, gate.balance_bias, u, indices, narrow, values, kept,
            num_tokens, num_ranks, logits.stride(0), projection.stride(0), gate.top_k * scale,
            K=gate.top_k, RHO=num_ranks // num_experts, SIGMOID=gate.score_function == "sigmoid",
            BIASED=gate.biased_gates, HALF=halves, BLOCK_N=block_n, BLOCK_R=block_r,
        )  # fmt: skip
    return u, indices, Kept(kept, narrow, values)


@triton.jit
def _compact_weights(
    values_ptr, rows, row_ok, DIVIDES: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    places = tl.arange(0, BLOCK_K)
    ok = row_ok[:, None] & (places < K)[None, :]
    values = tl.load(values_ptr + rows[:, None] * K + places[None, :], mask=ok, other=0.0).to(tl.float32)
    return values, _weights(values, (places < K)[None, :] & (rows >= 0)[:, None], 1, DIVIDES)


@triton.jit
def _spread_kernel(
    indices_ptr, values_ptr, kept_ptr, u_ptr, num_tokens, num_ranks, factor,
    K: tl.constexpr, RHO: tl.constexpr, DIVIDES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks, places = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row_ok = rows < num_tokens
    ok = row_ok[:, None] & (ranks < num_ranks)[None, :]
    _, weights = _compact_weights(values_ptr, rows, row_ok, DIVIDES, K, BLOCK_K)
    u = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for j in range(K):
        expert = tl.load(indices_ptr + rows * K + j, mask=row_ok, other=0).to(tl.int32)
        gate = tl.sum(tl.where((places == j)[None, :], weights, 0.0), 1) * factor
        hit = (ranks // RHO)[None, :] == expert[:, None]
        kept = tl.load(kept_ptr + (rows * K + j)[:, None] * RHO + (ranks % RHO)[None, :], mask=hit & ok, other=0.0)
        u = tl.where(hit, _gated(kept, gate[:, None]), u)
    tl.store(u_ptr + rows[:, None] * num_ranks + ranks[None, :], u.to(u_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(
    du_ptr, indices_ptr, values_ptr, kept_ptr, b_ptr, both_ptr, num_tokens, num_ranks, num_experts, factor,
    K: tl.constexpr, RHO: tl.constexpr, SIGMOID: tl.constexpr, DIVIDES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks, places, experts = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    row_ok = rows < num_tokens
    taken = row_ok[:, None] & (places < K)[None, :]
    values, weights = _compact_weights(values_ptr, rows, row_ok, DIVIDES, K, BLOCK_K)
    index = tl.load(indices_ptr + rows[:, None] * K + places[None, :], mask=taken, other=0).to(tl.int32)
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for q in range(RHO):
        du = tl.load(du_ptr + rows[:, None] * num_ranks + index * RHO + q, mask=taken, other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + (rows[:, None] * K + places[None, :]) * RHO + q, mask=taken, other=0.0)
        products += du * kept.to(tl.float32)
    shared = products - tl.sum(products * weights, 1)[:, None]
    if not SIGMOID:
        slope = weights
    elif DIVIDES:
        score = values - tl.load(b_ptr + index, mask=taken, other=0.0)
        slope = tl.where(values <= _SMALLEST, 0.0, score * (1.0 - score))
        slope /= tl.sum(tl.where(taken, values, 0.0), 1)[:, None]
    else:
        slope = weights * (1.0 - tl.exp(values))
    dz = shared * factor * slope
    width = num_ranks + num_experts
    ok = row_ok[:, None] & (ranks < num_ranks)[None, :]
    du = tl.load(du_ptr + rows[:, None] * num_ranks + ranks[None, :], mask=ok, other=0.0)
    dp = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    spread = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for j in range(K):
        here = (places == j)[None, :]
        expert = tl.sum(tl.where(here, index, 0), 1)[:, None]
        gate = (tl.sum(tl.where(here, weights, 0.0), 1) * factor)[:, None]
        dp = tl.where((ranks // RHO)[None, :] == expert, _gated(du, gate), dp)
        spread = tl.where(experts[None, :] == expert, tl.sum(tl.where(here, dz, 0.0), 1)[:, None], spread)
    tl.store(both_ptr + rows[:, None] * width + ranks[None, :], dp.to(both_ptr.dtype.element_ty), mask=ok)
    ok = row_ok[:, None] & (experts < num_experts)[None, :]
    place = both_ptr + rows[:, None] * width + num_ranks + experts[None, :]
    tl.store(place, spread.to(both_ptr.dtype.element_ty), mask=ok)


def backward(dy: Tensor, B: Tensor, kept: Kept, gate: TokenGate, scale: float) -> tuple[Tensor, Tensor]:
    """Differentiate u Bᵀ and the gate; see `gate.backward`."""
    u = spread(kept, gate, scale, B.shape[1])
    return gate_backward(dy @ B, kept, gate, scale), u.t() @ dy


def spread(kept: Kept, gate: TokenGate, scale: float, num_ranks: int) -> Tensor:
    """Return u (N, r) once more, from what was saved."""
    num_tokens = len(kept.projections)
    u = kept.projections.new_empty(num_tokens, num_ranks)
    block_r = triton.next_power_of_2(num_ranks)
    block_n = max(1, 2048 // block_r)
    if num_tokens:
        _spread_kernel[(triton.cdiv(num_tokens, block_n),)](
            kept.indices, kept.values, kept.projections, u, num_tokens, num_ranks, gate.top_k * scale,
            K=gate.top_k, RHO=num_ranks // len(gate.weight), DIVIDES=divides(gate),
            BLOCK_N=block_n, BLOCK_K=triton.next_power_of_2(gate.top_k), BLOCK_R=block_r,
        )  # fmt: skip
    return u


def gate_backward(du: Tensor, kept: Kept, gate: TokenGate, scale: float) -> Tensor:
    """Return [dp, dz] (N, r + E), the gradients of projection and logits, from du (N, r)."""
    (num_tokens, num_ranks), num_experts = du.shape, len(gate.weight)
    both = du.new_empty(num_tokens, num_ranks + num_experts)
    block_r = triton.next_power_of_2(num_ranks)
    block_n = max(1, 2048 // block_r)
    if num_tokens:
        _backward_kernel[(triton.cdiv(num_tokens, block_n),)](
            du.contiguous(), kept.indices, kept.values, kept.projections, gate.balance_bias, both,
            num_tokens, num_ranks, num_experts, gate.top_k * scale,
            K=gate.top_k, RHO=num_ranks // num_experts, SIGMOID=gate.score_function == "sigmoid",
            DIVIDES=divides(gate), BLOCK_N=block_n, BLOCK_K=triton.next_power_of_2(gate.top_k), BLOCK_R=block_r,
            BLOCK_E=triton.next_power_of_2(num_experts),
        )  # fmt: skip
    return both


@triton.jit
def _decode_kernel(
    y_ptr, z_ptr, p_ptr, b_ptr, B_ptr, indices_ptr, num_ranks, d_out, z_stride, p_stride, factor,
    K: tl.constexpr, RHO: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    rank_ok = ranks < num_ranks
    z = tl.load(z_ptr + row * z_stride + ranks // RHO, mask=rank_ok, other=0.0)[None, :]
    bias = tl.load(b_ptr + ranks // RHO, mask=rank_ok, other=0.0)[None, :]
    keys = (1.0 / (1.0 + tl.exp(-z)) if SIGMOID else z) + bias
    packed = _packed(keys, (ranks // RHO)[None, :], rank_ok[None, :])
    chosen = packed == _TAKEN
    for j in range(K):
        best = tl.max(packed, 1)
        hit = packed == best[:, None]
        chosen = chosen | hit
        packed = tl.where(hit, _TAKEN, packed)
        if tl.program_id(1) == 0:
            tl.store(indices_ptr + row * K + j + tl.arange(0, 1), 255 - (best & 255))
    gates = _weights(_values(z, bias, SIGMOID, BIASED), chosen, RHO, SIGMOID and BIASED) * factor
    p = tl.load(p_ptr + row * p_stride + ranks, mask=rank_ok, other=0.0)[None, :]
    u = tl.where(chosen, _gated(p, gates).to(p.dtype).to(tl.float32), 0.0)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    column_ok = columns < d_out
    ok = column_ok[:, None] & rank_ok[None, :]
    B = tl.load(B_ptr + columns[:, None] * num_ranks + ranks[None, :], mask=ok, other=0.0).to(tl.float32)
    # Where u is not a number it must stay one, and where a rank is unused its B, finite or not, must not count.
    update = tl.sum(tl.where(chosen, B * u, 0.0), 1)
    y = tl.load(y_ptr + row * d_out + columns, mask=column_ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d_out + columns, (y + update).to(y_ptr.dtype.element_ty), mask=column_ok)


def decode(y: Tensor, logits: Tensor, projection: Tensor, B: Tensor, gate: TokenGate, scale: float) -> Tensor:
    """Add the update to y (N, d_out), which is contiguous, in place; return the chosen experts (N, k).

    One launch for what `forward` and the product with B (d_out, r) take several.
    """
    (num_tokens, num_ranks), d_out = projection.shape, len(B)
    indices = torch.empty(num_tokens, gate.top_k, dtype=torch.int64, device=y.device)
    block_d = 32
    if num_tokens:
        _decode_kernel[(num_tokens, triton.cdiv(d_out, block_d))](
            y, logits, projection, gate.balance_bias, B.contiguous(), indices,
            num_ranks, d_out, logits.stride(0), projection.stride(0), gate.top_k * scale,
            K=gate.top_k, RHO=num_ranks // logits.shape[1], SIGMOID=gate.score_function == "sigmoid",
            BIASED=gate.biased_gates, BLOCK_R=triton.next_power_of_2(num_ranks), BLOCK_D=block_d,
        )  # fmt: skip
    return indices


@triton.jit
def _count_kernel(
    indices_ptr, y_ptr, mask_ptr, load_ptr, num_tokens, num_experts, y_stride,
    K: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    row_ok = rows < num_tokens
    first = tl.load(y_ptr + rows * y_stride, mask=row_ok, other=0.0).to(tl.float32)
    counts = row_ok & (first == first)
    if MASKED:
        counts = counts & (tl.load(mask_ptr + rows, mask=row_ok, other=0) != 0)
    load = tl.zeros((BLOCK_E,), tl.float32)
    for j in range(K):
        expert = tl.load(indices_ptr + rows * K + j, mask=row_ok, other=0)
        hit = (expert[:, None] == experts[None, :]) & counts[:, None]
        load += tl.sum(hit.to(tl.float32), 0)
    # Whole numbers: their sum does not depend on its order.
    tl.atomic_add(load_ptr + experts, load, mask=experts < num_experts)


def count(y: Tensor, indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """Count as `load_of_output`, in one launch beside that which makes the zeros."""
    num_tokens, top_k = indices.shape
    flat = y.detach().reshape(-1, y.shape[-1])
    load = torch.zeros(num_experts, dtype=torch.float32, device=y.device)
    block_e = triton.next_power_of_2(num_experts)
    block_n = max(16, 8192 // block_e)
    if num_tokens:
        _count_kernel[(triton.cdiv(num_tokens, block_n),)](
            indices.contiguous(), flat, indices if mask is None else mask.to(torch.uint8), load,
            num_tokens, num_experts, flat.stride(0),
            K=top_k, MASKED=mask is not None, BLOCK_N=block_n, BLOCK_E=block_e,
        )  # fmt: skip
    return load
