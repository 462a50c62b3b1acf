"""What the op is given, what its backward keeps, and what its backward returns.

Shapes: N tokens (all leading dimensions together), d_in and d_out features, r ranks, of which q are used, E experts of
ρ = r / E ranks, k active experts, G rows of gates, each for N / G tokens in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..routing.token import TokenGate

PLAIN = frozenset({Tensor, nn.Parameter})
"""The types of tensors that are what they seem."""


class Base(NamedTuple):
    """The frozen layer to whose output the update is added, as the layer describes it.

    Attributes:
        apply: A bound callable, never a module: x (…, d_in) to (…, d_out).
        weight: Its frozen plain weight where the op may differentiate through it itself: a plain layer that nobody
            watches, of plain tensors that nothing trains. None: autograd does.
        transposed: The weight is (d_in, d_out), as in transformers' Conv1D.
        fresh: Nothing but the caller can hold on to the output: it may be overwritten.
        bias: (d_out,), with `weight`: for a backend that applies the layer itself.
    """

    apply: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    transposed: bool = False
    fresh: bool = False
    bias: Tensor | None = None


class Operands(NamedTuple):
    """What the update s · (g ⊙ (x Aᵀ)) Bᵀ is made of.

    Attributes:
        x: (…, d_in) the layer's input, which a token gate reads.
        dropped: (…, d_in) x after dropout, which A reads; None: x.
        A: (r, d_in).
        B: (d_out, r).
        gate: A token gate; gates (G, q) of the first q ranks; or None where all are 1.
        scale: s.
        dtype: What the two products are computed in.
    """

    x: Tensor
    dropped: Tensor | None
    A: Tensor
    B: Tensor
    gate: TokenGate | Tensor | None
    scale: float
    dtype: torch.dtype

    @property
    def source(self) -> Tensor:
        """(…, d_in) what A reads."""
        return self.x if self.dropped is None else self.dropped

    @property
    def num_used(self) -> int:
        """q: how many ranks are used, the first ones."""
        return self.gate.shape[1] if isinstance(self.gate, Tensor) else self.A.shape[0]

    def used(self) -> tuple[Tensor, Tensor]:
        """Return A (q, d_in) and B (d_out, q) of the ranks that are used."""
        num_used = self.num_used
        if num_used == self.A.shape[0]:
            return self.A, self.B
        return self.A.narrow(0, 0, num_used), self.B.narrow(1, 0, num_used)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return x, dropped, A, B, the gate's tensor (W_g or gates) and its balancing bias."""
        if isinstance(self.gate, TokenGate):
            return *self[:4], self.gate.weight, self.gate.balance_bias
        return *self[:4], self.gate, None

    def with_tensors(self, *tensors: Any) -> Operands:
        """Return the same with other `tensors`; None in a tensor's place where backward does not need it."""
        x, dropped, A, B, gate, bias = tensors
        if isinstance(self.gate, TokenGate):
            gate = TokenGate(gate, bias, *self.gate[2:])
        return Operands(x, dropped, A, B, gate, self.scale, self.dtype)


class Kept(NamedTuple):
    """What backward keeps beside the operands; how exactly is the backend's own.

    Attributes:
        projections: (N, q) x Aᵀ; with a token gate its chosen columns alone, (N, k · ρ).
        indices: (N, k) a token gate's chosen experts, uint8 where E ≤ 256.
        values: (N, k) what a token gate's gates are computed from: log-scores, or keys where they are divided.
    """

    projections: Tensor
    indices: Tensor | None = None
    values: Tensor | None = None


class Needed(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    dropped: bool
    A: bool
    B: bool
    gate: bool


class Gradients(NamedTuple):
    """The gradients of the operands' tensors, each in its tensor's dtype and shape, x's and dropped's (N, d_in).

    None where not needed.
    """

    x: Tensor | None = None
    dropped: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    gate: Tensor | None = None
