"""`slots.py` as Triton kernels: one launch each, whatever slots the rows have.

A program of the logits takes a block of rows, a slot and a slice, looks whether a row of the block has that slot, and
leaves where none has; so each row meets its own slot's W_g, and a launch depends on shapes alone, which CUDA graphs
need. The gates' kernel reads each row's settings and bias by its slot.

The products are float32, as the router has them in training. The choice is the maximum of int64 keys that hold the
score's bits above the expert's number, k times; the lowest index wins ties and a NaN is the largest, as in
`routing.select_experts`. With TRITON_INTERPRET=1 the kernels run on the CPU, which is how the tests run them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing.token import SMALLEST_KEY

_FIELDS = tl.constexpr(5)  # see `slots.FIELDS`
# Above every key of a chosen place lies every key that is valid.
_MASKED = tl.constexpr(-(1 << 62))
_TAKEN = tl.constexpr(-(1 << 62) - 1)
_SMALLEST = tl.constexpr(SMALLEST_KEY)
_MOST = tl.constexpr(1024)  # experts, and so ranks


@triton.jit
def _logits_kernel(
    x_ptr, weight_ptr, settings_ptr, slots_ptr, z_ptr, num_rows, d_in, most_experts, x_stride,
    SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot, place = tl.program_id(1), tl.program_id(2)
    i, first = place % SLICES, place // SLICES * BLOCK_E
    settings = settings_ptr + (slot * SLICES + i) * _FIELDS
    top_k, num_experts = tl.load(settings), tl.load(settings + 2)
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mine = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1) == slot
    if (top_k == 0) | (first >= num_experts) | (tl.max(mine.to(tl.int32), 0) == 0):
        return
    experts = first + tl.arange(0, BLOCK_E)
    weight = weight_ptr + (slot * SLICES + i).to(tl.int64) * most_experts * d_in
    z = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, d_in, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + columns[None, :],
            mask=mine[:, None] & (columns < d_in)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + experts[None, :] * d_in + columns[:, None],
            mask=(experts < num_experts)[None, :] & (columns < d_in)[:, None],
            other=0.0,
        )
        z = tl.dot(x.to(tl.float32), w, z, input_precision="ieee")
    ok = mine[:, None] & (experts < num_experts)[None, :]
    tl.store(z_ptr + (rows[:, None] * SLICES + i) * most_experts + experts[None, :], z, mask=ok)


def slot_logits(x: Tensor, weight: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    """Compute each row's router logits; see `slots.slot_logits`, of which places without a gate hold anything here."""
    slots_, slices, most_experts, d_in = weight.shape
    z = torch.empty(len(x), slices, most_experts, dtype=torch.float32, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    block_n = 16 if len(x) <= 16 else 64
    block_e = min(64, max(16, triton.next_power_of_2(most_experts)))
    grid = (triton.cdiv(len(x), block_n), slots_, slices * triton.cdiv(most_experts, block_e))
    if len(x):
        _logits_kernel[grid](
            x, weight, settings, slots, z, len(x), d_in, most_experts, x.stride(0),
            SLICES=slices, BLOCK_N=block_n, BLOCK_E=block_e, BLOCK_D=64,
        )  # fmt: skip
    return z


@triton.jit
def _packed(keys, experts, valid):
    # (…) int64 that order as (key, −expert) do; masked places come last.
    bits = tl.where(keys == 0.0, 0.0, keys).to(tl.int32, bitcast=True)
    bits = tl.where(keys != keys, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    packed = bits.to(tl.int64) * _MOST + (_MOST - 1 - experts)
    return tl.where(valid, packed, _MASKED)


@triton.jit
def _gates_kernel(
    z_ptr, bias_ptr, settings_ptr, slots_ptr, gates_ptr, num_rows, num_slots, most_ranks,
    SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)[None, :]
    row_ok = rows < num_rows
    slot = tl.load(slots_ptr + rows, mask=row_ok, other=-1)
    place = slot * SLICES + i
    has = (slot >= 0) & (slot < num_slots)  # rows that fill up a CUDA graph may hold anything
    settings = settings_ptr + place * _FIELDS
    top_k = tl.load(settings, mask=has, other=0)
    expert_rank = tl.load(settings + 1, mask=has & (top_k > 0), other=1)[:, None]
    num_experts = tl.load(settings + 2, mask=has, other=0)[:, None]
    softmax = tl.load(settings + 3, mask=has, other=0)[:, None] > 0
    biased = tl.load(settings + 4, mask=has, other=0)[:, None] > 0
    # A column a rank: the ranks of an expert carry one key, so that they are chosen together.
    experts = ranks // expert_rank
    ok = (experts < num_experts) & (top_k > 0)[:, None] & (ranks < most_ranks)
    z = tl.load(z_ptr + (rows[:, None] * SLICES + i) * most_ranks + experts, mask=ok, other=0.0)
    bias = tl.load(bias_ptr + place[:, None] * most_ranks + experts, mask=ok, other=0.0)
    score = tl.where(softmax, z, 1.0 / (1.0 + tl.exp(-z)))
    packed = _packed(score + bias, experts, ok)
    chosen = packed == _TAKEN
    for j in range(tl.max(top_k, 0)):
        best = tl.max(packed, 1)[:, None]
        hit = (packed == best) & (j < top_k)[:, None]
        chosen = chosen | hit
        packed = tl.where(hit, _TAKEN, packed)
    # Gates are the chosen scores' shares: as a softmax over log-scores, or, of biased sigmoids, a division.
    divides = biased & (softmax == 0)
    log_score = tl.where(softmax, z, tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z))))
    value = tl.where(biased, score + bias, log_score)
    value = tl.where(divides & (value < _SMALLEST), _SMALLEST, value)
    top = tl.max(tl.where(chosen, value, float("-inf")), 1)[:, None]
    raised = tl.where(chosen, tl.where(divides, value, tl.exp(value - top)), 0.0)
    total = tl.where((top_k > 0)[:, None], tl.sum(raised, 1)[:, None] / expert_rank, 1.0)
    gates = tl.where(chosen, raised / total * top_k[:, None], 0.0)
    gates = tl.where((has & (top_k == 0))[:, None], 1.0, gates)
    out = (rows[:, None] * SLICES + i) * most_ranks + ranks
    tl.store(gates_ptr + out, gates, mask=row_ok[:, None] & (ranks < most_ranks))


def slot_gates(logits: Tensor, bias: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    """Compute each row's gates; see `slots.slot_gates`."""
    num_rows, slices, most_ranks = logits.shape
    logits = logits.contiguous()
    gates = torch.empty_like(logits)
    block_r = triton.next_power_of_2(most_ranks)
    block_n = max(1, 1024 // block_r)
    if num_rows:
        _gates_kernel[(triton.cdiv(num_rows, block_n), slices)](
            logits, bias, settings, slots, gates, num_rows, len(bias), most_ranks,
            SLICES=slices, BLOCK_N=block_n, BLOCK_R=block_r,
        )  # fmt: skip
    return gates
