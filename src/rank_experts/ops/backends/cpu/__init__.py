"""The native CPU kernels: of the ranks, only those that a token uses are multiplied.

For token gates of which at most a quarter of the experts is active (`token.py`), for given gates of few ranks
(`given.py`), and for MoRE's gate itself (`tasks.py`). float32 and bfloat16 tensors in any mix; arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....routing.token import TokenGate
from ...operands import Gradients, Kept, Needed, Operands
from . import given, token
from .build import library
from .given import FEW_RANKS
from .tasks import serves_task_gate, task_gates, task_gates_backward
from .token import DTYPES, count, decode, pays

__all__ = [
    "NAME", "backward", "count", "decode", "forward", "serves", "serves_task_gate", "task_gates", "task_gates_backward"
]  # fmt: skip

NAME = "native CPU kernel"


def serves(op: Operands) -> bool:
    """Say whether the kernel is there, takes these operands, and is expected to beat dense products."""
    x, _, A, B, gate, _, dtype = op
    if isinstance(gate, TokenGate):
        expected, weight = pays(gate.top_k, gate.weight.shape[0]), gate.weight
    else:
        expected, weight = op.num_used <= FEW_RANKS, A
    if not expected or dtype not in DTYPES:
        return False
    for tensor in (x, A, B, weight):  # Not by all(), whose generator costs a token's decoding a microsecond.
        if not tensor.is_cpu or tensor.dtype not in DTYPES:
            return False
    return library() is not None


def forward(op: Operands, y: Tensor, fresh: bool) -> tuple[Tensor, Tensor | None, Kept]:
    """Add the update to y; see `Backend`."""
    dtype = y.dtype
    if dtype not in DTYPES:
        y = y.float().contiguous()
    elif not (fresh and y.is_contiguous()):
        y = y.clone(memory_format=torch.contiguous_format)
    indices, kept = token.forward(op, op.gate, y) if isinstance(op.gate, TokenGate) else (None, given.forward(op, y))
    return y.to(dtype), indices, kept


def backward(op: Operands, kept: Kept, dy: Tensor, dx: Tensor | None, needed: Needed) -> Gradients:
    """Differentiate the update; see `Backend`."""
    dy = (dy if dy.dtype in DTYPES else dy.float()).contiguous()
    if isinstance(op.gate, TokenGate):
        return token.backward(op, op.gate, kept, dy, dx, needed)
    return given.backward(op, kept, dy, dx, needed)
