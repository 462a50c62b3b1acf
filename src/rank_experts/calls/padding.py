"""Which tokens of a layer's input mean something."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .rows import find_layout


def token_mask(call: Call | None, path: str, x: Tensor) -> Tensor | None:
    """Return (N,) true where a token of a layer's input is not padding; None: all are tokens.

    Args:
        call: The surrounding one.
        path: The layer's.
        x: (…, d) its input, N tokens in all. Padding is left out where they are a row's L tokens, see `rows.py`.
    """
    if call is None:
        return None
    if call.gathered is not None:
        return call.gathered.mask
    mask = call.mask
    if call.memory is not None and _same_tensor(x, call.memory):
        mask = call.memory_mask
    num_tokens = x.numel() // x.shape[-1]
    if mask is None or mask.dim() != 2 or mask.numel() != num_tokens:
        return None
    layout = find_layout(call, path, x, mask.shape[0])
    if layout is None or layout.owner is not None:
        return None
    return (mask if layout.is_in_turn else mask.T).reshape(-1).bool()


def _same_tensor(x: Tensor, other: Tensor) -> bool:
    # Reentrant checkpointing hands a block detached copies, which share the storage; so does a transposed one.
    return x is other or (
        not torch.compiler.is_compiling() and x.numel() == other.numel() and x.data_ptr() == other.data_ptr()
    )
